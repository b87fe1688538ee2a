// Building the page. Text only ever becomes text: nothing here parses HTML.

/** An element with attributes, and children that are elements or text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null).map(asNode));
  return element;
}

function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child));
}

/** A table with a name for screen readers; `rows` are lists of cells. */
export function makeTable(name, heads, rows) {
  // The roles are named because a narrow sidebar lays the rows out in another way.
  const columns = heads.map((head) => make("th", { scope: "col", role: "columnheader" }, head));
  return make(
    "table",
    { role: "table", "aria-label": name },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...columns)),
    make("tbody", { role: "rowgroup" }, ...rows.map((row) => makeRow(row, heads))),
  );
}

function makeRow([first, ...others], heads) {
  const cells = others.map((cell, at) =>
    make("td", { role: "cell", "data-head": heads[at + 1] }, ...[cell].flat()),
  );
  const head = make("th", { scope: "row", role: "rowheader" }, ...[first].flat());
  return make("tr", { role: "row" }, head, ...cells);
}

/** A word with a coloured dot before it. The word alone says everything. */
export function makeState(word, kind) {
  return make("span", { class: `xdit-state xdit-${kind}` }, word);
}

/** A bar; `parts` are shares of it, 0 to 1, with a class. Its text stands beside it. */
export function makeBar(parts) {
  const bar = make("div", { class: "xdit-bar", "aria-hidden": "true" });
  for (const [share, name] of parts) {
    const part = make("div", { class: name });
    part.style.width = `${Math.min(100, Math.max(0, share * 100))}%`;
    bar.append(part);
  }
  return bar;
}
