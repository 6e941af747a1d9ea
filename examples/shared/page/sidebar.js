// The list of this browser's conversations. On a narrow screen it is a drawer.

import { list } from "./conversations.js";
import { element, iconButton } from "./messages.js";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 47.99rem)"); // as in style.css

export class Sidebar {
  #shown = ""; // the list and the open conversation as JSON

  // The actions are `create()` and `remove(conversation)`.
  constructor(actions) {
    this.actions = actions;
    for (const button of document.querySelectorAll(".new")) {
      button.onclick = () => {
        this.close();
        actions.create();
      };
    }
    $("menu").onclick = () => this.#setOpen(true);
    $("close-menu").onclick = $("backdrop").onclick = () => this.close();
    narrow.addEventListener("change", () => this.#setOpen(false));
    this.#setOpen(false);
  }

  get isOpen() {
    return document.body.classList.contains("menu-open");
  }

  close() {
    if (!this.isOpen) return;
    this.#setOpen(false);
    $("menu").focus();
  }

  show(current) {
    const shown = JSON.stringify([list(), current]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const focused = $("conversations").contains(document.activeElement) ? document.activeElement : null;
    $("conversations").replaceChildren(...list().map((each) => this.#item(each, current)));
    $("no-conversations").hidden = $("conversations").hasChildNodes();
    if (focused) this.#focus(focused.localName, focused.dataset.id);
  }

  // Focus the conversation at a position after another one there was removed.
  focusItem(index) {
    const links = $("conversations").querySelectorAll("a");
    (links[Math.min(index, links.length - 1)] ?? document.querySelector("#sidebar .new")).focus();
  }

  #focus(name, id) {
    $("conversations").querySelector(`${name}[data-id="${CSS.escape(id)}"]`)?.focus();
  }

  #item(conversation, current) {
    const item = element("li", "");
    const link = element("a", conversation.title, { href: `#${conversation.id}`, title: conversation.title });
    link.dataset.id = conversation.id;
    if (conversation.id === current) link.ariaCurrent = "page";
    link.onclick = () => this.close();
    const remove = iconButton("delete", `Delete “${conversation.title}”`);
    remove.dataset.id = conversation.id;
    remove.onclick = () => this.#confirmRemoval(conversation);
    item.append(link, remove);
    return item;
  }

  #confirmRemoval(conversation) {
    const dialog = $("confirm");
    const index = list().findIndex(({ id }) => id === conversation.id);
    $("confirm-title").textContent = `Delete “${conversation.title}”?`;
    dialog.onclose = async () => {
      if (dialog.returnValue !== "delete") {
        this.#focus("button", conversation.id); // the list may have changed while the dialog was open
        return;
      }
      await this.actions.remove(conversation);
      this.focusItem(index);
    };
    dialog.returnValue = "";
    dialog.showModal();
  }

  #setOpen(open) {
    document.body.classList.toggle("menu-open", open);
    // A closed drawer, and the page behind an open one, cannot be reached with the keyboard.
    $("sidebar").inert = narrow.matches && !open;
    $("chat").inert = open;
    $("menu").ariaExpanded = String(open);
    if (open) $("close-menu").focus();
  }
}
