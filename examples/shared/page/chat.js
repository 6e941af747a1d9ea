// One open conversation: its messages, and the answer that is being written.

import * as api from "./api.js";
import { isKnown, remember } from "./conversations.js";
import { pendingKey, read, write } from "./storage.js";

const SAVE_TRIES = 10; // the server saves a stopped answer shortly after its stream has ended
const SAVE_PAUSE = 200; // milliseconds
const RETRY = 2000; // milliseconds

// The user stops an answer in a deleted conversation, so that the server does not save it afterwards.
export async function deleteConversation(id) {
  const pending = read(pendingKey(id));
  if (pending) {
    await api.stop(pending.id).catch(() => {}); // it may have ended or expired
    for (let tries = 0; tries < SAVE_TRIES; tries++) {
      const messages = await api.loadMessages(id);
      if ((messages.at(-1)?.id ?? null) !== pending.parentId) break;
      await api.pause(SAVE_PAUSE);
    }
  }
  await api.deleteConversation(id);
  write(pendingKey(id), null);
}

export class Chat {
  #closed = false;
  #stopReading = null;
  #pending = null; // the turn that is shown and not yet stored, see storage.js
  messages = []; // the stored messages of the current path
  busy = true; // while the messages are loading or an answer is not yet stored

  // The page is the `MessageList` `list`, the `Composer` `composer`, and the functions `note(text)`, which shows a text,
  // `announce(text)`, for screen readers, and `changed()`.
  constructor(id, page) {
    this.id = id;
    this.page = page;
  }

  get leafId() {
    return this.messages.at(-1)?.id ?? null;
  }

  get isEmpty() {
    return !this.busy && !this.messages.length && !this.#pending;
  }

  get isWriting() {
    return this.#stopReading !== null;
  }

  // Load the messages, and continue to read an answer that is being written.
  async open() {
    this.busy = true;
    while (!this.#closed && !(await this.#load())) {
      this.page.note("The server does not respond. Trying again …");
      await api.pause(RETRY);
    }
    if (this.#closed) return;
    this.page.note("");
    this.busy = false;
    const pending = read(pendingKey(this.id));
    if (!this.messages.some(({ id }) => id === this.page.composer.editedId)) this.page.composer.cancel();
    if (pending && pending.parentId === this.leafId) {
      this.#follow(pending);
    } else {
      write(pendingKey(this.id), null);
      this.render();
      if (this.isEmpty && isKnown(this.id)) this.page.note("This conversation has expired or was deleted.");
    }
    if (this.messages.length && !isKnown(this.id)) remember(this.id, this.messages[0].content);
    this.page.list.scrollToEnd();
    this.page.changed();
  }

  // Another conversation is opened. The server continues to write the answer.
  close() {
    this.#closed = true;
    this.#stopReading?.();
  }

  // Another tab has sent a message.
  reopen() {
    if (!this.busy && read(pendingKey(this.id))) this.open();
  }

  render() {
    if (this.#closed) return;
    this.#show(this.#pending !== null);
    this.page.composer.setBusy({ sendable: !this.busy, stoppable: this.isWriting });
    this.page.changed();
  }

  // Send a message: as an alternative to the message `alternativeTo` if given, else at the end.
  async send(prompt, alternativeTo = null) {
    await this.#start({ prompt }, async () => {
      const oldLeaf = this.leafId;
      try {
        if (alternativeTo !== null) this.messages = await api.change(this.id, "rewind", alternativeTo);
        return await api.ask(this.id, prompt);
      } catch (error) {
        if (this.leafId !== oldLeaf) {
          this.messages = await api.change(this.id, "return", oldLeaf).catch(() => this.messages);
        }
        throw error;
      }
    });
    if (!this.#closed) this.page.composer.sent(prompt);
  }

  // Ask for another answer to the question before the message at an index.
  async again(index) {
    const { id, content } = this.messages[index - 1];
    await this.#start({ prompt: content, questionId: id }, () => api.askAgain(this.id, id));
  }

  async change(action, message) {
    if (this.busy) return;
    this.messages = await api.change(this.id, action, message.id);
    this.#pending = null;
    if (!this.messages.some(({ id }) => id === this.page.composer.editedId)) this.page.composer.cancel();
    this.render();
  }

  async stop() {
    const pending = read(pendingKey(this.id));
    if (this.isWriting && pending) await api.stop(pending.id);
  }

  #show(keepPending) {
    // Another answer to a question takes the place of the old one, and of the messages after it.
    const question = this.messages.findIndex(({ id }) => id === this.#pending?.questionId);
    const shown = question < 0 ? this.messages : this.messages.slice(0, question + 1);
    this.page.list.show(shown, { busy: this.busy, editedId: this.page.composer.editedId, keepPending });
  }

  async #load() {
    try {
      this.messages = await api.loadMessages(this.id);
      return true;
    } catch {
      return false;
    }
  }

  async #start(turn, request) {
    if (this.busy) return;
    this.busy = true;
    this.render();
    let pending;
    try {
      pending = { ...turn, id: await request(), parentId: this.leafId };
    } catch (error) {
      this.busy = false; // the composer keeps the text
      this.render();
      throw error;
    }
    write(pendingKey(this.id), pending);
    remember(this.id, turn.prompt);
    if (!this.#closed) this.#follow(pending);
  }

  // Read the pending answer until it has ended and is stored.
  #follow(pending) {
    const { list, note, announce } = this.page;
    this.busy = true;
    this.#pending = pending;
    this.#show(false);
    const answer = list.showPending(pending.questionId ? null : pending.prompt);
    this.#stopReading = api.followAnswer(pending.id, {
      onText: answer.append,
      onConnected: () => note(""),
      onLost: () => note("The connection is lost. Trying again …"),
      onEnd: (outcome, missing) => this.#end(pending, answer, outcome, missing),
    });
    this.page.composer.setBusy({ sendable: false, stoppable: true });
    list.scrollToEnd();
    announce("The answer is being written.");
    this.page.changed();
  }

  async #end(pending, answer, outcome, missing) {
    this.#stopReading = null;
    answer.finish();
    this.page.note(outcome);
    // A screen reader reads the answer once, when it is complete.
    this.page.announce(`The answer has ended. ${answer.spoken()}`);
    this.page.composer.setBusy({ sendable: false, stoppable: false });
    for (let tries = 0; tries < SAVE_TRIES && this.leafId === pending.parentId && !this.#closed; ) {
      if (await this.#load()) tries++; // an unreachable server does not count
      if (this.leafId === pending.parentId) await api.pause(SAVE_PAUSE);
    }
    if (this.#closed) return;
    const atEnd = this.page.list.atEnd;
    this.busy = false;
    if (this.leafId !== pending.parentId || missing) {
      if (read(pendingKey(this.id))?.id === pending.id) write(pendingKey(this.id), null);
      this.#pending = null;
    } else {
      // The producer died before it saved the turn. The stream remains readable until it expires.
      const question = this.messages.findIndex(({ id }) => id === pending.questionId);
      const again = () => (question < 0 ? this.send(pending.prompt) : this.again(question + 1));
      answer.offer("Try again", this.page.attempt(again));
    }
    this.render();
    if (atEnd) this.page.list.scrollToEnd();
  }
}
