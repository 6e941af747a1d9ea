// The box in which the user writes or edits a message. Each conversation has its own draft.

import { draftKey, read, write } from "./storage.js";

const $ = (id) => document.getElementById(id);

export class Composer {
  #conversation = null;
  #draft = ""; // the unsent message, while another one is being edited
  editedId = null;

  // The actions are `send(text, editedId)`, `stop()` and `edited()`, after the edited message has changed.
  constructor(actions) {
    this.actions = actions;
    $("form").onsubmit = (event) => {
      event.preventDefault();
      const text = $("prompt").value.trim();
      if (text) actions.send(text, this.editedId);
    };
    $("prompt").oninput = () => this.#changed();
    $("prompt").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("form").requestSubmit();
    };
    $("cancel").onclick = () => this.cancel();
    $("stop").onclick = actions.stop;
    addEventListener("resize", () => this.#resize());
  }

  // Show the draft of a conversation.
  open(conversation) {
    this.#conversation = conversation;
    const { text = "", edited = null } = read(draftKey(conversation)) ?? {};
    this.editedId = edited?.id ?? null;
    this.#draft = text;
    this.#show(edited?.text ?? text);
  }

  edit({ id, content }) {
    if (this.editedId === null) this.#draft = $("prompt").value;
    this.editedId = id;
    this.#show(content);
    this.focus();
  }

  // Leave the edited message as it is, and show the draft again.
  cancel() {
    if (this.editedId === null) return;
    this.editedId = null;
    this.#show(this.#draft);
    this.focus();
  }

  // Remove a message that was sent, unless the user has changed it since.
  sent(text) {
    if ($("prompt").value.trim() !== text) return;
    if (this.editedId === null) this.#show("");
    else this.cancel();
  }

  setBusy({ sendable, stoppable }) {
    $("send").disabled = !sendable;
    $("send").hidden = stoppable;
    $("stop").hidden = !stoppable;
  }

  focus() {
    $("prompt").focus({ preventScroll: true });
  }

  #show(text) {
    const prompt = $("prompt");
    prompt.value = text;
    prompt.setSelectionRange(text.length, text.length);
    $("editing").hidden = this.editedId === null;
    this.#changed();
    this.actions.edited();
  }

  #changed() {
    const text = $("prompt").value;
    const editing = this.editedId !== null;
    const draft = { text: editing ? this.#draft : text, edited: editing ? { id: this.editedId, text } : null };
    write(draftKey(this.#conversation), draft.text || editing ? draft : null);
    this.#resize();
  }

  #resize() {
    const prompt = $("prompt");
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`; // the style sheet has the limits
  }
}
