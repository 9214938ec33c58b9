// Shows the pack's own sentence when a node fails or an input is refused. The front end hides it behind "View details".
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let lastError;
const said = new Set();

function toast(severity, detail, life) {
  const message = { severity, summary: "CogVideoX xDiT", detail, life };
  app.extensionManager.toast.add(message);
  return message;
}

function showError(sentence) {
  if (lastError) app.extensionManager.toast.remove(lastError);
  lastError = toast("error", sentence);
}

app.registerExtension({
  name: "CogVideoX-xDiT.Errors",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => {
      if (detail.exception_type === "CogVideoXError") showError(detail.exception_message.trim().split("\n")[0]);
    });
    api.addEventListener("cogvideox-xdit.refused", ({ detail }) => showError(detail.text));
    // A warning stays in its node. The toast is for those who do not look at the node, as in App mode; once a session is enough.
    api.addEventListener("cogvideox-xdit.line", ({ detail }) => {
      if (detail.level !== "warning" || said.has(detail.text)) return;
      said.add(detail.text);
      toast("warn", detail.text, 15000);
    });
  },
});
