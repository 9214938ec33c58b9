// Finds the pack's nodes and their values in the open workflow.
import { app } from "../../../scripts/app.js";

const BYPASSED = 4; // the mode of a node, in LiteGraph

export function nodes(type, graph = app.rootGraph ?? app.graph) {
  return allNodes(graph).filter((node) => node.type === type);
}

// All nodes of a graph and of its subgraphs.
function allNodes(graph) {
  return (graph?.nodes ?? graph?._nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? allNodes(node.subgraph) : [])]);
}

// The widgets that stand for a widget of a node, each with its node: its own, and those of subgraphs that show it as theirs, at any depth.
export function standIns(node, name) {
  const own = [node, node.widgets?.find((widget) => widget.name === name)];
  const slot = node.inputs?.find((each) => each.widget?.name === name);
  return [own, ...hostsOf(node, slot)].filter(([, widget]) => widget);
}

// The widgets of the subgraphs whose input is connected to a node's slot.
function hostsOf(node, slot) {
  if (slot?.link == null) return [];
  const hosts = new Set(allNodes(app.rootGraph ?? app.graph).filter((each) => each.subgraph && each.subgraph === node.graph));
  return [...hosts].flatMap((host) => {
    const shown = host.inputs[host.subgraph.inputs.findIndex((input) => input.linkIds?.includes(slot.link))];
    return shown ? standIns(host, shown.name) : [];
  });
}

// The value that a run takes: of the outermost subgraph that shows the widget, if one does.
export function valueOf(node, name) {
  return node && standIns(node, name).at(-1)?.[1].value;
}

// Sets a widget, and those that stand for it.
export function setValue(node, name, value) {
  for (const [owner, widget] of standIns(node, name)) {
    widget.value = value;
    widget.callback?.(value);
    owner.setDirtyCanvas?.(true, true);
  }
  noteChange();
}

// Has the page see a change, which it can undo, save, and report.
export function noteChange() {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker); // the second in ComfyUI 0.3.64
}

// The model and size that the workflow asks for, which is a tile's where it only upscales, and the devices of an xDiT Backend, as the planner's route takes them.
export function question(backend = nodes("XDiTBackend")[0]) {
  const sized = allNodes(app.rootGraph ?? app.graph).find((node) => ["width", "height", "length"].every((name) => valueOf(node, name)));
  const [sampler] = nodes("XDiTCogVideoXSampler");
  const [upscaler] = sampler ? [] : nodes("XDiTCogVideoXUpscale");
  const side = valueOf(upscaler, "tile_size");
  const [loader] = nodes("XDiTLoadCogVideoX");
  const [windows] = sampler ? nodes("XDiTCogVideoXContextWindows").filter(({ mode }) => mode !== BYPASSED) : [];
  const query = {
    model: valueOf(loader, "model_name"),
    width: side ?? valueOf(sized, "width"),
    height: side ?? valueOf(sized, "height"),
    length: valueOf(upscaler, "tile_frames") ?? valueOf(sized, "length"),
    batch: upscaler ? undefined : valueOf(sized, "batch_size"),
    cfg: upscaler ? 1 : valueOf(sampler, "cfg"), // there is no guidance
    kind: upscaler ? "upscale" : "sample",
    ...Object.fromEntries(["quantize", "fp8", "attention"].map((name) => [name, valueOf(loader, name)])),
    ...(windows && {
      window: valueOf(windows, "window"),
      overlap: valueOf(windows, "overlap"),
      step_cache: valueOf(loader, "step_cache"),
      guidance_cache: valueOf(loader, "guidance_cache"),
      image: nodes("XDiTCogVideoXImageToVideo").length ? 1 : undefined,
    }),
    devices: valueOf(backend, "devices"),
  };
  return Object.fromEntries(Object.entries(query).filter(([, value]) => value !== undefined));
}
