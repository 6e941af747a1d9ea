// The page: the conversation in the URL, the sidebar, and the keys.

import { Chat, deleteConversation } from "./chat.js";
import { Composer } from "./composer.js";
import { forget, list as listConversations } from "./conversations.js";
import { MessageList } from "./messages.js";
import { Sidebar } from "./sidebar.js";
import { draftKey, onChange, pendingKey, write } from "./storage.js";

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
  again: attempt((index) => chat.again(index)),
  change: attempt((action, message) => chat.change(action, message)),
  copy: attempt(copy),
});

const sidebar = new Sidebar({
  create: () => { location.hash = newId(); },
  remove: attempt(async ({ id }) => {
    await deleteConversation(id);
    forget(id);
    write(draftKey(id), null);
    sidebar.show(chat.id);
    if (id === chat.id) location.hash = newId();
  }),
});

function newId() {
  const random = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Update what depends on the state of the conversation.
function changed() {
  const title = listConversations().find(({ id }) => id === chat.id)?.title;
  document.title = title ? `${title} – ${NAME}` : NAME;
  $("title").textContent = title ?? NAME;
  $("welcome").hidden = !chat.isEmpty;
  sidebar.show(chat.id);
}

// The URL holds the id of the conversation, so a reload and a second tab show the same one.
function open() {
  if (!/^#[\w-]+$/.test(location.hash)) history.replaceState(null, "", `#${newId()}`);
  const id = location.hash.slice(1);
  chat?.close();
  list.clear();
  note("");
  chat = null; // the composer must not render the old conversation
  composer.open(id);
  chat = new Chat(id, { list, composer, note, announce, attempt, changed });
  composer.setBusy({ sendable: false, stoppable: false });
  changed();
  if (matchMedia("(hover: hover)").matches) composer.focus(); // it would open the keyboard of a phone
  chat.open();
}

$("skip").onclick = () => composer.focus();
addEventListener("hashchange", open);
onChange((key) => { if (key === pendingKey(chat.id)) chat.reopen(); });

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
