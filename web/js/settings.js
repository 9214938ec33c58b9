// Settings that the server reads when ComfyUI starts; see __init__.py. An environment variable counts more than its setting.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "CogVideoX-xDiT.Settings",
  settings: [
    {
      id: "CogVideoX-xDiT.Processes.IdleMinutes",
      name: "Minutes without a job after which a group ends",
      tooltip: "The next job starts it again in seconds. 0: it never ends by itself. Counts from the next start of ComfyUI.",
      type: "number",
      defaultValue: 30,
      attrs: { min: 0 },
    },
    {
      id: "CogVideoX-xDiT.Processes.MemoryGiB",
      name: "GiB of each GPU",
      tooltip: "Leaves the rest to other programs. 0: all that is free. Counts from the next start of ComfyUI.",
      type: "number",
      defaultValue: 0,
      attrs: { min: 0 },
    },
    {
      id: "CogVideoX-xDiT.Processes.Python",
      name: "Interpreter of the group",
      tooltip: "A path to another Python that has xfuser. Empty: ComfyUI's own. Counts from the next start of ComfyUI.",
      type: "text",
      defaultValue: "",
    },
    {
      id: "CogVideoX-xDiT.Processes.Preload",
      name: "Prepare groups when ComfyUI starts",
      tooltip: "The imports of a group are done at once, which takes 0.5 GB of main memory; the first run then starts sooner. Counts from the next start of ComfyUI.",
      type: "boolean",
      defaultValue: false,
    },
  ],
});
