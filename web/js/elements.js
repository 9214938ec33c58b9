// Makes elements of a page. Text is set as text, never as markup.
import { say } from "./words.js";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A bar that is filled to a share from 0 to 1.
export function bar(share, kind = "") {
  const width = `${Math.round(100 * Math.min(1, Math.max(0, share)))}%`;
  return element("div", { class: `xdit-bar ${kind}` }, element("div", { style: `width: ${width}` }));
}

export const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);

export function seconds(value) {
  if (value >= 90) return say("{number} min", { number: Math.round(value / 60) });
  return say("{number} s", { number: value >= 10 ? Math.round(value) : value.toPrecision(2) });
}
