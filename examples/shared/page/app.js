// The page: the conversation in the URL, the sidebar, and the keys.

import { deleteConversation } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import * as conversations from "./conversations.js";
import { MessageList } from "./messages.js";
import { Sidebar } from "./sidebar.js";
import { draftKey, write } from "./storage.js";
import { onTold, tell } from "./tabs.js";

const $ = (id) => document.getElementById(id);
const NAME = document.title;
const COPIED = 2000; // milliseconds

let chat = null;

const note = (text) => { $("note").textContent = text; };
const announce = (text) => { $("announcer").textContent = text; };

// Return a function that runs an action and shows its error.
const attempt = (action) => async (...parameters) => {
  note("");
  try {
    await action(...parameters);
  } catch (error) {
    note(`That failed: ${error.message}`);
  }
};

async function copy(text, button) {
  await navigator.clipboard.writeText(text);
  announce("Copied.");
  const label = button.lastChild;
  const before = label.textContent;
  if (before === "Copied") return;
  label.textContent = "Copied";
  setTimeout(() => { label.textContent = before; }, COPIED);
}

const composer = new Composer({
  send: attempt((text, editedId) => chat.send(text, editedId)),
  stop: attempt(() => chat.stop()),
  edited: () => chat?.render(),
});

const list = new MessageList($("messages"), $("scroller"), {
  edit: (message) => composer.edit(message),
  again: attempt((message) => chat.again(message)),
  change: attempt(async (step, message) => {
    await chat.change(step, message);
    await refreshList();
  }),
  copy: attempt(copy),
});

const sidebar = new Sidebar({
  create,
  remove: attempt(async ({ id }) => {
    await deleteConversation(id);
    write(draftKey(id), null);
    tell(id);
    await refreshList();
    if (id === chat.id) create();
  }),
});

function newId() {
  const random = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function create() {
  history.pushState({ isNew: true }, "", `#${newId()}`);
  open();
}

// Update what depends on the state of the conversation.
function changed() {
  const title = conversations.titleOf(chat.id);
  document.title = title ? `${title} – ${NAME}` : NAME;
  $("title").textContent = title ?? NAME;
  $("welcome").hidden = !chat.isEmpty;
  sidebar.show(chat.id);
}

async function refreshList() {
  try {
    await conversations.refresh();
  } catch {
    return; // the list is loaded again after the next change
  }
  changed();
}

// The URL holds the id of the conversation, so a reload and a second tab show the same one.
function open() {
  if (!/^#[\w-]+$/.test(location.hash)) history.replaceState({ isNew: true }, "", `#${newId()}`);
  const id = location.hash.slice(1);
  chat?.close();
  list.clear();
  note("");
  chat = null; // the composer must not render the old conversation
  composer.open(id);
  const saved = () => {
    if (id === location.hash.slice(1)) history.replaceState(null, "");
    tell(id);
    refreshList();
  };
  chat = new Chat(id, history.state?.isNew === true, { list, composer, note, announce, changed, saved });
  composer.setBusy({ sendable: false, stoppable: false });
  changed();
  if (matchMedia("(hover: hover)").matches) composer.focus(); // it would open the keyboard of a phone
  chat.open();
}

$("skip").onclick = () => composer.focus();
addEventListener("hashchange", open);
onTold((id) => {
  if (id === chat.id) chat.reopen();
  refreshList();
});
document.addEventListener("visibilitychange", () => { // another browser with the same cookie tells nothing
  if (document.visibilityState !== "visible") return;
  chat.reopen();
  refreshList();
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || $("confirm").open) return;
  if (sidebar.isOpen) sidebar.close();
  else if (chat.isWriting) $("stop").click();
  else composer.cancel();
});

$("messages").addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) attempt(copy)(button.closest(".code").querySelector("code").textContent, button);
});

for (const example of document.querySelectorAll("#welcome button")) {
  example.onclick = attempt(() => chat.send(example.textContent.trim()));
}

open();
refreshList();
