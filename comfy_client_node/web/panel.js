// The status panel in ComfyUI's sidebar.
//
// ComfyUI imports every .js file of this folder. Only this one does anything by itself.

import { app } from "../../scripts/app.js";
import { Panel } from "./panel/panel.js";

const ID = "xdit-sidecar";

let open = null;

function close() {
  open?.close();
  open = null;
}

app.registerExtension({
  name: "xdit_sidecar.panel",
  setup() {
    app.extensionManager?.registerSidebarTab?.({
      id: ID,
      icon: "pi pi-server",
      title: "xDiT",
      tooltip: "xDiT sidecar",
      type: "custom",
      // The frontend calls this each time it draws the sidebar, also for a panel that is there.
      render(element) {
        if (open?.isIn(element)) return;
        close();
        open = new Panel(element);
      },
      destroy: close,
    });
  },
});
