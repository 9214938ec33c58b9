// Lists of values in the place of text widgets. Another text can still be typed. The value stays a plain string at its place, so a
// saved workflow is the same, and a page without this file shows a text widget.
import { app } from "../../../scripts/app.js";
import { noteChange, setValue } from "./graph.js";
import { say } from "./words.js";

// Puts a list in the place of a node's text widget.
export function makeList(node, name) {
  const at = node.widgets.findIndex((each) => each.name === name);
  const [text] = node.widgets.splice(at, 1);
  const widget = node.addWidget("combo", name, text.value, () => {}, { ...text.options, values: [text.value] });
  node.widgets.splice(at, 0, node.widgets.pop());
  Object.assign(widget, { label: text.label, tooltip: text.tooltip });
  return widget;
}

// Gives a list its values, its present one, and "other…", which asks for a text. Returns a function that sets the values.
export function fillList(node, widget) {
  const other = say("other…");
  const list = []; // always the same one, as the page keeps it
  const { callback } = widget;
  let choices = [];
  let last = widget.value;

  function fill() {
    if (widget.value !== other) last = widget.value;
    list.splice(0, list.length, ...new Set([...choices, last]), other);
    return list;
  }

  // The page itself sets the values of inputs that are declared as lists.
  Object.defineProperty(widget.options, "values", { configurable: true, enumerable: true, get: fill, set() {} });

  widget.callback = async (value, ...others) => {
    if (value !== other) {
      callback?.call(widget, value, ...others);
      return noteChange();
    }
    widget.value = last;
    const typed = await app.extensionManager.dialog.prompt({
      title: node.title,
      message: widget.label ?? widget.name,
      defaultValue: last,
    });
    if (typed?.trim()) setValue(node, widget.name, typed.trim());
  };
  return (values) => {
    choices = values;
    fill();
  };
}
