// xDiT Backend: the state of the group in the node, and lists of the devices that are there and of the plans that fit.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { fillList, makeList } from "./choices.js";
import { nodes, question, standIns } from "./graph.js";
import { choices, labelOf, watch } from "./group.js";
import { showLines } from "./lines.js";
import { say } from "./words.js";

const LISTS = ["devices", "plan"];
const fills = new WeakMap();
const asked = new WeakMap();
let line = "";

function describe(state) {
  const { is_group: isGroup, ranks, plan } = state;
  if (!isGroup || ["absent", "failed"].includes(state.state)) return say("no group runs");
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
    if (node.type === "XDiTBackend") showLines(node.id, line);
  }
}

// Fills each node's lists, and asks for their values again if the workflow has changed what they depend on.
async function fillLists() {
  for (const node of nodes("XDiTBackend")) {
    const query = question(node);
    const key = JSON.stringify(query);
    if (asked.get(node)?.key !== key) asked.set(node, { key, values: choices(query) });
    const values = await asked.get(node).values;
    if (values.error) {
      asked.delete(node); // it is asked again with the next change
      continue;
    }
    for (const name of LISTS) {
      for (const [owner, widget] of standIns(node, name)) {
        if (!fills.has(widget)) fills.set(widget, fillList(owner, widget));
        fills.get(widget)(values[name]);
      }
    }
  }
}

app.registerExtension({
  name: "CogVideoX-xDiT.Backend",
  nodeCreated(node) {
    if (node.comfyClass !== "XDiTBackend") return;
    for (const name of LISTS) {
      const widget = makeList(node, name);
      fills.set(widget, fillList(node, widget));
    }
  },
  setup() {
    watch(show);
    api.addEventListener("graphChanged", fillLists);
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => setTimeout(showLine));
  },
  afterConfigureGraph() {
    fillLists();
    setTimeout(showLine);
  },
});
