// The conversations of this browser, the last used one first. With a server that lists the conversations of a user,
// replace this file alone.

import { read, write } from "./storage.js";

export const KEY = "conversations";
const TITLE_LENGTH = 80;

// Return the conversations, each as `{id, title}`.
export function list() {
  const stored = read(KEY);
  return Array.isArray(stored) ? stored.filter((each) => typeof each?.id === "string") : [];
}

export const isKnown = (id) => list().some((each) => each.id === id);

// Put a conversation first. Its first question becomes its title.
export function remember(id, question) {
  const others = list();
  const known = others.find((each) => each.id === id);
  const title = question.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  write(KEY, [known ?? { id, title }, ...others.filter((each) => each !== known)]);
}

export function forget(id) {
  write(KEY, list().filter((each) => each.id !== id));
}
