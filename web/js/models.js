// Load CogVideoX: says before Run that a published model is not downloaded. ComfyUI's own list of missing models has only files.
import { app } from "../../../scripts/app.js";
import { nodes, valueOf } from "./graph.js";
import { showLines } from "./lines.js";
import { say } from "./words.js";

let lastToast;

// The list of the node has a model that is not here under the name that it is going to have, with its size and licence.
function missing(node) {
  const { values } = node.widgets.find(({ name }) => name === "model_name").options;
  const offer = values.find((each) => each.startsWith(`${valueOf(node, "model_name")} (download: `));
  if (!offer || valueOf(node, "download") !== "off") return undefined;
  const [model, terms] = offer.slice(0, -1).split(" (download: ");
  return say("{model} is missing ({terms}): set download, or choose another model.", { model, terms });
}

app.registerExtension({
  name: "CogVideoX-xDiT.Models",
  afterConfigureGraph() {
    if (lastToast) app.extensionManager.toast.remove(lastToast);
    for (const node of nodes("XDiTLoadCogVideoX")) {
      const text = missing(node);
      if (!text) continue;
      showLines(node.id, text);
      lastToast = { severity: "warn", summary: "CogVideoX xDiT", detail: text, life: 15000 };
      app.extensionManager.toast.add(lastToast);
    }
  },
});
