// What make_workflows.py has done inside ComfyUI's page: build a graph, show it alone.

/** Replace the page's graph by this one; returns the file that the front end would save. */
function buildWorkflow({ id, nodes, links, groups, view }) {
  const { app, LiteGraph } = window;
  app.clean();  // pictures in nodes
  app.graph.clear();
  app.graph.id = id;
  const made = new Map();
  for (const described of nodes) {
    const node = LiteGraph.createNode(described.type);
    if (!node) throw new Error(`no node ${described.type}`);
    node.id = made.size + 1;
    node.pos = described.pos;
    app.graph.add(node);
    for (const [name, value] of Object.entries(described.widgets)) {
      const widget = node.widgets?.find((each) => each.name === name);
      if (!widget) throw new Error(`${described.type} has no widget ${name}`);
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
    }
    made.set(described.name, node);
  }
  for (const [from, output, to, input] of links) {
    const slot = made.get(to).findInputSlot(input);
    if (slot < 0 || !made.get(from).connect(output, made.get(to), slot)) {
      throw new Error(`${from} does not go into ${input} of ${to}`);
    }
  }
  for (const { title, bounding, color } of groups) {
    const group = new LiteGraph.LGraphGroup(title);
    group.pos = bounding.slice(0, 2);
    group.size = bounding.slice(2);
    group.color = color;
    app.graph.add(group);
  }
  // Last: callbacks, such as that of a picture's preview, change sizes.
  for (const { name, size } of nodes) made.get(name).setSize(size);
  lookAt(view);
  return JSON.stringify(app.graph.serialize(), null, 2);
}

/** Scroll and zoom: { scale, offset }. */
function lookAt({ scale, offset }) {
  const { ds } = window.app.canvas;
  ds.scale = scale;
  ds.offset[0] = offset[0];
  ds.offset[1] = offset[1];
  window.app.canvas.setDirty(true, true);
}

/** Hide everything of the page that is not the graph. */
function showGraphOnly() {
  const style = document.createElement("style");
  style.textContent = `
    body * { visibility: hidden !important; }
    #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }`;
  document.head.append(style);
  window.app.canvas.show_info = false;
}
