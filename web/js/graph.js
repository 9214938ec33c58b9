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

export function valueOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name)?.value;
}

export function setValue(node, name, value) {
  const widget = node.widgets?.find((each) => each.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
  node.setDirtyCanvas?.(true, true);
  app.extensionManager.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}

// The model, size and devices that the workflow asks for, as the planner's route takes them.
export function question() {
  const all = app.rootGraph ?? app.graph;
  const sized = (all?.nodes ?? all?._nodes ?? []).find((node) => ["width", "height", "length"].every((name) => valueOf(node, name)));
  const query = {
    model: valueOf(nodes("XDiTLoadCogVideoX")[0], "model_name"),
    width: valueOf(sized, "width"),
    height: valueOf(sized, "height"),
    length: valueOf(sized, "length"),
    cfg: valueOf(nodes("XDiTCogVideoXSampler")[0], "cfg"),
    devices: valueOf(nodes("XDiTBackend")[0], "devices"),
  };
  return Object.fromEntries(Object.entries(query).filter(([, value]) => value !== undefined));
}
