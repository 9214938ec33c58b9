// xDiT Backend: the state of the group in the node, and lists of the devices that are there and of the plans that fit.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { makeList } from "./choices.js";
import { nodes, question } from "./graph.js";
import { choices, labelOf, watch } from "./group.js";
import { say } from "./words.js";

const LISTS = ["devices", "plan"];
const lists = new WeakMap();
const asked = new WeakMap();
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

// Asks for each node's values again, if the workflow has changed what they depend on.
async function askAgain() {
  for (const node of nodes("XDiTBackend")) {
    const query = question(node);
    const key = JSON.stringify(query);
    if (asked.get(node) === key) continue;
    asked.set(node, key);
    const values = await choices(query);
    for (const name of LISTS) lists.get(node)?.[name](values[name]);
  }
}

app.registerExtension({
  name: "CogVideoX-xDiT.Backend",
  nodeCreated(node) {
    if (node.comfyClass !== "XDiTBackend") return;
    lists.set(node, Object.fromEntries(LISTS.map((name) => [name, makeList(node, name)])));
  },
  setup() {
    watch(show);
    api.addEventListener("graphChanged", askAgain);
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => setTimeout(showLine));
  },
  afterConfigureGraph() {
    askAgain();
    setTimeout(showLine);
  },
});
