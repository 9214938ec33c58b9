// Colours of this pack's sockets and links: those of the core's sockets that hold the same kind of thing.
import { app } from "../../../scripts/app.js";
import { element } from "./elements.js";

const COLOURS = {
  COGVIDEOX_XDIT_MODEL: "#B39DDB", // as MODEL
  COGVIDEOX_XDIT_CONTROLNET: "#6EE7B7", // as CONTROL_NET
  XDIT_BACKEND: "#26C6DA", // like no socket of the core
};

function colourCanvas() {
  Object.assign(app.canvas.default_connection_color_byType, COLOURS);
  Object.assign(globalThis.LGraphCanvas?.link_type_colors ?? {}, COLOURS);
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "CogVideoX-xDiT.Sockets",
  setup() {
    const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
    document.head.append(element("style", {}, `:root { ${rules.join(" ")} }`)); // Vue nodes
    colourCanvas();
    // A palette has no colours for other packs' sockets, and takes theirs away.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(colourCanvas));
  },
  afterConfigureGraph: colourCanvas,
});
