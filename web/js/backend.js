// xDiT Backend: the state of the group in the node, and devices and plans to choose from in its menu. Other text can still be typed.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { nodes, question, setValue } from "./graph.js";
import { labelOf, plans, watch } from "./group.js";
import { say } from "./words.js";

let suggested = { devices: ["auto"], plan: ["auto", "single"] };
let line = "";

function describe(state) {
  const { is_group: isGroup, ranks, plan } = state;
  if (!isGroup || state.state === "absent") return say("no group runs");
  if (state.state === "idle") return say("{count} ranks, warm, {plan}", { count: ranks.length, plan });
  return say("{count} ranks, {state}, {plan}", { count: ranks.length, state: labelOf(state), plan });
}

function show(state) {
  const next = describe(state);
  if (next === line || (line === "" && !state.is_group)) return;
  line = next;
  showLine();
}

function showLine() {
  if (!line) return;
  for (const node of app.canvas.graph?.nodes ?? []) {
    if (node.type === "XDiTBackend") api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text: line });
  }
}

async function askAgain() {
  if (!nodes("XDiTBackend").length) return;
  const table = await plans(question());
  if (table.suggested) suggested = table.suggested;
}

app.registerExtension({
  name: "CogVideoX-xDiT.Backend",
  setup() {
    watch(show);
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => setTimeout(showLine));
  },
  afterConfigureGraph() {
    askAgain();
    setTimeout(showLine);
  },
  getNodeMenuItems(node) {
    if (node.type !== "XDiTBackend") return [];
    askAgain();
    return Object.entries(suggested).map(([name, values]) => ({
      content: `xDiT ${name}`,
      submenu: { options: values.map((value) => ({ content: value, callback: () => setValue(node, name, value) })) },
    }));
  },
});
