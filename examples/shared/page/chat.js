// One open conversation: its messages, and the answer that is being written.

import * as api from "./api.js";
import { rememberQuestion } from "./conversations.js";
import { currentPath, leafOfAlternative } from "./history.js";

const RETRY = 2000; // milliseconds
const TITLE_LENGTH = 80;

export class Chat {
  #closed = false;
  #stored; // the conversation as the server has sent it, null if there is none, undefined before the first response
  #stream = null; // the id of the stream whose answer is shown below the stored messages
  #stopReading = null;
  #isOutdated = false; // another tab has changed the conversation while this one was busy
  #hasAskedTitle = false;
  messages = []; // the stored messages of the current path, up to the question that is being answered
  busy = true; // while the messages are loading or an answer is being written

  // The page is the `MessageList` `list`, the `Composer` `composer`, and the functions `note(text)`, which shows a text,
  // `announce(text)`, for screen readers, `changed()`, after this object has changed, and `saved()`, after the stored
  // conversation has. `isNew`: whether the conversation is not stored yet.
  constructor(id, isNew, page) {
    this.id = id;
    this.isNew = isNew;
    this.page = page;
  }

  get leafId() {
    return this.messages.at(-1)?.id ?? null;
  }

  get isEmpty() {
    return !this.busy && !this.messages.length;
  }

  get isWriting() {
    return this.#stopReading !== null;
  }

  // Load the messages, and follow an answer that is being written.
  async open() {
    await this.#load();
    this.#settle();
    if (!this.#closed) this.page.list.scrollToEnd();
  }

  // Another conversation is opened. The server continues to write the answer.
  close() {
    this.#closed = true;
    this.#stopReading?.();
  }

  // Another tab or browser may have changed the conversation.
  async reopen() {
    this.#isOutdated = this.busy;
    if (this.busy) return;
    try {
      const stored = await this.#request();
      this.#isOutdated = this.busy; // the user has sent a message meanwhile
      if (this.busy || this.#closed) return;
      this.#accept(stored);
    } catch {
      return; // the messages stay as they are
    }
    this.#settle();
  }

  render() {
    if (this.#closed) return;
    this.#show(this.#stream !== null);
    this.page.composer.setBusy({ sendable: !this.busy, stoppable: this.isWriting });
    this.page.changed();
  }

  // Send a message: as an alternative to the message `editedId` if given, else at the end.
  async send(prompt, editedId = null) {
    const edited = this.messages.find(({ id }) => id === editedId);
    await this.#ask({ prompt, parentId: edited ? edited.parentId : this.leafId });
  }

  // Ask for another answer to a question, or to the question of an answer.
  async again(message) {
    await this.#ask({ regenerate: true, parentId: message.role === "user" ? message.id : message.parentId });
  }

  // Switch to the alternative that is `step` alternatives after a message.
  async change(step, message) {
    if (this.busy) return;
    this.busy = true;
    try {
      const activeLeafId = leafOfAlternative(this.#stored.history, message, step);
      await api.changeConversation(this.id, { activeLeafId });
      this.#accept(await this.#request());
    } finally {
      this.#settle();
    }
  }

  async stop() {
    if (this.isWriting) await api.stop(this.#stream);
  }

  async #ask(fields) {
    if (this.busy) return;
    this.busy = true;
    this.render();
    let stream;
    try {
      stream = await api.ask(this.id, fields);
    } catch (error) { // the composer keeps the text
      // The server may have got the question, if only its response is lost.
      await this.#request().then((stored) => this.#accept(stored)).catch(() => {});
      this.#settle();
      throw error;
    }
    this.isNew = false;
    this.page.saved();
    if (this.#closed) return;
    if (fields.prompt !== undefined) this.page.composer.sent(fields.prompt);
    await this.#load();
    if (!this.#closed) this.#follow(stream);
  }

  async #request() {
    const stored = await api.loadConversation(this.id);
    const question = stored && currentPath(stored.history).at(-1);
    if (question?.isUnanswered && stored.activeStreamId === null) {
      // The server reads the messages first. The answer may have been stored before it looked for the stream.
      return api.loadConversation(this.id);
    }
    return stored;
  }

  #accept(stored) {
    this.#stored = stored;
    this.messages = stored ? currentPath(stored.history) : [];
    if (this.messages.length) rememberQuestion(this.id, this.messages[0].content);
  }

  // Load until the server responds.
  async #load() {
    let waiting = false;
    while (!this.#closed) {
      try {
        this.#accept(await this.#request());
        if (waiting) this.page.note("");
        return;
      } catch (error) {
        if (this.#closed) return;
        if (error.status < 500) { // trying again does not help
          this.page.note(`That failed: ${error.message}`);
          return;
        }
        waiting = true;
        this.page.note("The server does not respond. Trying again …");
        await api.pause(RETRY);
      }
    }
  }

  // Follow the answer that is being written, or let the user write.
  #settle() {
    if (this.#closed) return;
    const { composer, note, saved } = this.page;
    this.#stream = null;
    if (!this.messages.some(({ id }) => id === composer.editedId)) composer.cancel();
    const question = this.messages.at(-1);
    if (question?.isUnanswered && question.streamId === this.#stored.activeStreamId) {
      this.#follow(question.streamId);
      return;
    }
    this.busy = false;
    this.render();
    if (this.#stored === null && !this.isNew) {
      note("This conversation has expired, was deleted, or belongs to another browser.");
    }
    if (this.#isOutdated) {
      this.#isOutdated = false;
      this.reopen();
    } else {
      this.#addTitle().then((added) => added && saved());
    }
  }

  #show(keepPending) {
    this.page.list.show(this.messages, { busy: this.busy, editedId: this.page.composer.editedId, keepPending });
  }

  // Read an answer until it has ended and is stored.
  #follow(stream) {
    const { list, note, announce } = this.page;
    const index = this.messages.findIndex(({ streamId }) => streamId === stream);
    if (index < 0) { // another tab has switched to another branch
      this.#settle();
      return;
    }
    this.messages = this.messages.slice(0, index + 1); // a short answer may be stored already
    this.busy = true;
    this.#show(false);
    this.#stream = stream;
    const answer = list.showPending(stream);
    this.#stopReading = api.followAnswer(stream, {
      onText: answer.append,
      onConnected: () => note(""),
      onLost: () => note("The connection is lost. Trying again …"),
      onEnd: (outcome) => this.#end(answer, outcome),
    });
    this.render();
    list.scrollToEnd();
    announce("The answer is being written.");
  }

  async #end(answer, outcome) {
    const { list, note, announce, composer, saved } = this.page;
    this.#stopReading = null;
    answer.finish();
    note(outcome);
    // A screen reader reads the answer once, when it is complete.
    announce(`The answer has ended. ${answer.spoken()}`);
    composer.setBusy({ sendable: false, stoppable: false });
    await this.#load(); // the server adds an answer that was broken off, if its process could not
    if (this.#closed) return;
    if (outcome) note(outcome); // again: the server may not have responded for a while
    const { atEnd } = list;
    this.#settle();
    if (atEnd) list.scrollToEnd();
    saved();
  }

  // Let the model write a title when it has written the first answer. Return whether there is a new one.
  async #addTitle() {
    const [question, answer] = this.messages;
    if (this.#stored?.title !== null || !answer || this.#hasAskedTitle) return false;
    this.#hasAskedTitle = true;
    try {
      const messages = [question, answer].map(({ role, content }) => ({ role, content }));
      const title = (await api.askTitle(messages)).trim().slice(0, TITLE_LENGTH);
      if (title) await api.changeConversation(this.id, { title });
      return title !== "";
    } catch {
      return false; // until the conversation is opened again, its question stands for the title
    }
  }
}
