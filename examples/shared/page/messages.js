// The list of messages on the page: stored ones, and an answer that is being written.

import { update } from "./markdown.js";

const LABELS = { user: "You", assistant: "Assistant", system: "Summary" };
const STATES = { stopped: "Stopped", error: "Incomplete", deleted: "Incomplete" };
const LAZINESS = 4; // pauses between two renderings, as a multiple of the time that the last one took

export function element(name, text, properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text, ...properties });
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, label, properties = {}) {
  const button = element("button", "", { type: "button", className: "icon", ariaLabel: label, title: label, ...properties });
  button.append(icon(name));
  return button;
}

export class MessageList {
  #articles = new Map(); // by the id of the stored message
  #pending = null; // the article of the answer that is being written

  // The actions are `edit(message)`, `again(message)`, `change(step, message)` and `copy(text, button)`.
  constructor(container, scroller, actions) {
    this.container = container;
    this.scroller = scroller;
    this.actions = actions;
    scroller.addEventListener("scroll", () => this.#showJump());
    new ResizeObserver(() => this.#showJump()).observe(container);
    document.getElementById("to-end").onclick = () => this.scrollToEnd();
  }

  clear() {
    this.#articles.clear();
    this.#pending = null;
    this.container.replaceChildren();
  }

  // Show the messages of the current path. A pending answer is removed, unless it is kept behind them.
  show(messages, { busy, editedId, keepPending }) {
    const focused = document.activeElement;
    const focus = this.container.contains(focused) && [focused.closest("article")?.dataset.index, focused.dataset.action];
    if (!keepPending) this.#adoptPending(messages);
    const articles = messages.map((message, index) => {
      const article = this.#articles.get(message.id) ?? this.#article(message.role, message.content);
      this.#articles.set(message.id, article);
      article.dataset.index = index;
      article.classList.toggle("editing", message.id === editedId);
      article.querySelector("footer").replaceChildren(...this.#controls(message, index, busy, editedId));
      return article;
    });
    // Elements that stay in the document keep their focus and selection.
    const kept = [...articles, this.#pending];
    [...this.container.children].filter((each) => !kept.includes(each)).forEach((each) => each.remove());
    articles.forEach((article, index) => {
      if (this.container.children[index] !== article) {
        this.container.insertBefore(article, this.container.children[index] ?? null);
      }
    });
    if (focus) this.#restoreFocus(...focus);
  }

  // Show the answer that a stream is writing. Return the functions for it.
  showPending(stream) {
    const article = this.container.appendChild(this.#article("assistant", ""));
    article.dataset.stream = stream;
    this.#pending = article;
    const text = article.querySelector(".text");
    text.id = "writing";
    article.ariaBusy = "true";
    let timer = null;
    let pace = 0; // milliseconds

    const render = () => {
      timer = null;
      const atEnd = this.atEnd;
      const began = performance.now();
      update(text, article.source);
      pace = Math.min(1000, (performance.now() - began) * LAZINESS);
      if (atEnd) this.scrollToEnd();
    };
    const append = (piece) => {
      article.source += piece;
      timer ??= setTimeout(render, pace);
    };
    const finish = () => {
      clearTimeout(timer);
      render();
      text.id = "";
      article.ariaBusy = null;
    };
    const spoken = () => {
      const copy = text.cloneNode(true);
      copy.querySelectorAll(".code-header").forEach((header) => header.remove());
      return copy.textContent;
    };
    return { append, finish, spoken };
  }

  get atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 60;
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #showJump() {
    document.getElementById("to-end").hidden = this.atEnd;
  }

  // Keep the element of a pending answer for its stored message, so that nothing on the page moves.
  #adoptPending(messages) {
    const article = this.#pending;
    this.#pending = null;
    if (article === null) return;
    const message = messages.find(({ id }) => id === article.dataset.stream);
    if (message?.content === article.source) this.#articles.set(message.id, article);
  }

  #article(role, content) {
    const article = element("article", "", { className: role, ariaLabel: LABELS[role] ?? role });
    article.source = content;
    const text = element("div", "", { className: "text" });
    if (role === "user") text.textContent = content;
    else update(text, content);
    article.append(text, element("footer", ""));
    return article;
  }

  #controls(message, index, busy, editedId) {
    const { edit, again, change } = this.actions;
    const controls = [];
    const add = (control, action, onclick, enabled = true) => {
      control.dataset.action = action;
      controls.push(Object.assign(control, { type: "button", onclick, disabled: busy || !enabled }));
    };
    const labelled = (name, label) => {
      const button = element("button", "");
      button.append(icon(name), label);
      return button;
    };
    if (message.alternatives > 1) {
      const { alternative, alternatives } = message;
      add(iconButton("left", "Previous alternative"), "previous", () => change(-1, message), alternative > 1);
      controls.push(element("span", `${alternative} / ${alternatives}`, { className: "count" }));
      add(iconButton("right", "Next alternative"), "next", () => change(1, message), alternative < alternatives);
    }
    if (STATES[message.state]) controls.push(element("span", STATES[message.state], { className: "state" }));
    if (message.id === editedId) controls.push(element("span", "Being edited", { className: "state" }));
    else if (message.role === "user") add(labelled("edit", "Edit"), "edit", () => edit(message));
    const isUnanswered = message.isUnanswered && !busy;
    if (isUnanswered) controls.push(element("span", "No answer", { className: "state" }));
    if (isUnanswered || (message.role === "assistant" && index)) {
      add(labelled("again", "Try again"), "again", () => again(message));
    }
    if (message.role === "assistant") {
      if (navigator.clipboard) {
        add(labelled("copy", "Copy"), "copy", ({ currentTarget }) => this.actions.copy(message.content, currentTarget));
        controls.at(-1).disabled = false;
      }
    }
    return controls;
  }

  #restoreFocus(index, action) {
    if (document.activeElement !== document.body) return;
    const buttons = [...this.container.querySelectorAll(`article[data-index="${index}"] button:not(:disabled)`)];
    const other = { previous: "next", next: "previous" }[action]; // an arrow at its end is disabled
    const target = [action, other].map((each) => buttons.find((button) => button.dataset.action === each)).find(Boolean);
    (target ?? document.getElementById("prompt")).focus({ preventScroll: true });
  }
}
