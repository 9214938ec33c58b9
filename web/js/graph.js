// Finds the pack's nodes and their values in the open workflow.
import { app } from "../../../scripts/app.js";

export function nodes(type, graph = app.rootGraph ?? app.graph) {
  const found = [];
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    if (node.type === type) found.push(node);
    if (node.subgraph) found.push(...nodes(type, node.subgraph));
  }
  return found;
}

// The widgets that stand for a widget of a node, each with its node: its own, and those of subgraphs that show it as theirs.
export function standIns(node, name, graph = app.rootGraph ?? app.graph) {
  const found = graph === (app.rootGraph ?? app.graph) ? [[node, node.widgets?.find((widget) => widget.name === name)]] : [];
  const link = node.inputs?.find((slot) => slot.widget?.name === name)?.link;
  for (const host of (graph?.nodes ?? []).filter((each) => each.subgraph)) {
    const at = host.subgraph.inputs.findIndex((input) => host.subgraph === node.graph && input.linkIds?.includes(link));
    found.push([host, host.widgets?.find((widget) => widget.name === host.inputs[at]?.name)]);
    found.push(...standIns(node, name, host.subgraph));
  }
  return found.filter(([, widget]) => widget);
}

export function valueOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name)?.value;
}

export function setValue(node, name, value) {
  const widget = node.widgets?.find((each) => each.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
  node.setDirtyCanvas?.(true, true);
  noteChange();
}

// Has the page see a change, which it can undo, save, and report.
export function noteChange() {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker); // the second in ComfyUI 0.3.64
}

// The model and size that the workflow asks for, which is a tile's where it only upscales, and the devices of an xDiT Backend, as the planner's route takes them.
export function question(backend = nodes("XDiTBackend")[0]) {
  const all = app.rootGraph ?? app.graph;
  const sized = (all?.nodes ?? all?._nodes ?? []).find((node) => ["width", "height", "length"].every((name) => valueOf(node, name)));
  const [sampler] = nodes("XDiTCogVideoXSampler");
  const [upscaler] = sampler ? [] : nodes("XDiTCogVideoXUpscale");
  const side = valueOf(upscaler, "tile_size");
  const query = {
    model: valueOf(nodes("XDiTLoadCogVideoX")[0], "model_name"),
    width: side ?? valueOf(sized, "width"),
    height: side ?? valueOf(sized, "height"),
    length: valueOf(upscaler, "tile_frames") ?? valueOf(sized, "length"),
    batch: upscaler ? undefined : valueOf(sized, "batch_size"),
    cfg: upscaler ? 1 : valueOf(sampler, "cfg"), // there is no guidance
    kind: upscaler ? "upscale" : "sample",
    devices: valueOf(backend, "devices"),
  };
  return Object.fromEntries(Object.entries(query).filter(([, value]) => value !== undefined));
}
