// Shows each node's lines again after a reload, a change of tab, or a step into a subgraph. The server keeps them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const LINE_BREAK = "  \n"; // in Markdown, as of Vue nodes, and in the classic renderer's plain text
const MARKUP = /[\\`*~\[<&]|(?<![a-zA-Z\d])_|_(?![a-zA-Z\d])|^[ \t#+=>-]|^\d(?=\d*[.)])/gm; // as nodes/comfy/events.py, which a test compares

// Shows lines in a node of the graph that is open, as they are in both renderers.
export function showLines(nodeId, ...lines) {
  const text = lines.map((line) => line.replace(MARKUP, (found) => `&#${found.charCodeAt()};`)).join(LINE_BREAK);
  api.dispatchCustomEvent("progress_text", { nodeId: String(nodeId), text });
}

async function showAgain() {
  const workflow = (app.rootGraph ?? app.graph)?.id;
  if (!workflow) return;
  const answer = await api.fetchApi(`/cogvideox-xdit/lines?workflow=${encodeURIComponent(workflow)}`);
  if (!answer.ok) return;
  for (const [nodeId, lines] of Object.entries(await answer.json())) {
    showLines(nodeId, ...lines.map((line) => line.text));
  }
}

app.registerExtension({
  name: "CogVideoX-xDiT.Lines",
  setup() {
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => setTimeout(showAgain));
  },
  afterConfigureGraph: showAgain,
});
