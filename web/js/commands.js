// The panel's buttons as commands, for the menu, the command search and key bindings.
import { app } from "../../../scripts/app.js";
import { act, logAddress } from "./group.js";
import { say } from "./words.js";

async function run(name) {
  const answer = await act(name);
  const severity = answer.error ? "warn" : "info";
  app.extensionManager.toast.add({ severity, summary: "CogVideoX xDiT", detail: answer.error ?? say(answer.done), life: 5000 });
}

const commands = [
  { id: "CogVideoX-xDiT.Free", label: "xDiT: free memory", icon: "pi pi-eraser", function: () => run("free") },
  { id: "CogVideoX-xDiT.Stop", label: "xDiT: stop group", icon: "pi pi-stop-circle", function: () => run("stop") },
  { id: "CogVideoX-xDiT.Restart", label: "xDiT: restart group", icon: "pi pi-refresh", function: () => run("restart") },
  { id: "CogVideoX-xDiT.Log", label: "xDiT: open the log of rank 0", icon: "pi pi-file", function: () => window.open(logAddress(0)) },
];

app.registerExtension({
  name: "CogVideoX-xDiT.Commands",
  commands,
  menuCommands: [{ path: ["Extensions", "xDiT"], commands: commands.map((command) => command.id) }],
});
