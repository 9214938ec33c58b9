// Shows each node's lines again after a reload, a change of tab, or a step into a subgraph. The server keeps them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const LINE_BREAK = "  \n"; // in Markdown, as of Vue nodes, and in the classic renderer's plain text

async function showAgain() {
  const workflow = (app.rootGraph ?? app.graph)?.id;
  if (!workflow) return;
  const answer = await api.fetchApi(`/cogvideox-xdit/lines?workflow=${encodeURIComponent(workflow)}`);
  if (!answer.ok) return;
  for (const [nodeId, lines] of Object.entries(await answer.json())) {
    api.dispatchCustomEvent("progress_text", { nodeId, text: lines.map((line) => line.text).join(LINE_BREAK) });
  }
}

app.registerExtension({
  name: "CogVideoX-xDiT.Lines",
  setup() {
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => setTimeout(showAgain));
  },
  afterConfigureGraph: showAgain,
});
