// Lists of values in the place of text widgets. Another text can still be typed. The value stays a plain string at its place, so a
// saved workflow is the same, and a page without this file shows a text widget.
import { app } from "../../../scripts/app.js";
import { noteChange, setValue } from "./graph.js";
import { say } from "./words.js";

// Makes a list of a node's text widget. Returns a function that sets the values to choose from.
export function makeList(node, name) {
  const at = node.widgets?.findIndex((each) => each.name === name) ?? -1;
  if (at < 0) return () => {};
  const [text] = node.widgets.splice(at, 1);
  const other = say("other…");
  const list = []; // always the same one, as the page keeps it
  let widget = text;
  let choices = [];
  let last = text.value;

  const options = {
    ...text.options,
    get values() {
      if (widget.value !== other) last = widget.value;
      list.splice(0, list.length, ...new Set([...choices, last]), other);
      return list;
    },
    set values(_) {}, // the page sets those of inputs that are declared as lists
  };

  async function pick(value) {
    if (value !== other) return noteChange();
    widget.value = last;
    const typed = await app.extensionManager.dialog.prompt({ title: node.title, message: text.label ?? name, defaultValue: last });
    if (typed?.trim()) setValue(node, name, typed.trim());
  }

  widget = node.addWidget("combo", name, text.value, pick, options);
  node.widgets.splice(at, 0, node.widgets.pop());
  Object.assign(widget, { label: text.label, tooltip: text.tooltip });
  return (values) => {
    choices = values;
    options.values; // fills the list
  };
}
