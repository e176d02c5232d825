// Elements from plain values. Text is always set as text: nothing from a file or the server becomes HTML.

export const $ = (selector) => document.querySelector(selector);

/** An element: properties by name, `aria-*` and `data-*` as attributes, children as nodes or text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Give a file to the user. */
export function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A message at the foot of the page: `actions` are [text, what it does]. Errors stay until they are closed. */
export function say(text, { isError = false, actions = [] } = {}) {
  const close = element("button", { type: "button", className: "quiet", "aria-label": "Close" }, "✕");
  const message = element("div", { className: isError ? "message error" : "message", role: isError ? "alert" : "status" });
  const buttons = actions.map(([label, act]) => {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", () => (message.remove(), act()));
    return button;
  });
  message.append(element("p", {}, text), ...buttons, close);
  close.addEventListener("click", () => message.remove());
  if (!isError) setTimeout(() => message.remove(), 6000);
  const all = $("#messages");
  all.append(message);
  // On a narrow screen more than one would hide the tools.
  const most = innerWidth < 700 ? 1 : 4;
  while (all.children.length > most) all.firstChild.remove();
}

/** A name for people: blanks for underscores. */
export const shown = (name) => name.replaceAll("_", " ");
