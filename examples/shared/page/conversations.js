// The conversations of this browser, as the server lists them: the last saved one first.

import { listConversations } from "./api.js";

const UNTITLED = "Untitled";
const TITLE_LENGTH = 80;

const questions = new Map(); // the first question of a conversation stands for its title until the server has one
let entries = [];
let refreshes = 0;

export const titleOf = (id) => entries.find((each) => each.id === id)?.title ?? questions.get(id) ?? null;

// Return the conversations, each as `{id, title}`.
export const list = () => entries.map(({ id }) => ({ id, title: titleOf(id) ?? UNTITLED }));

export async function refresh() {
  const number = ++refreshes;
  const loaded = await listConversations();
  if (number === refreshes) entries = loaded; // responses may arrive in another order
}

export function rememberQuestion(id, question) {
  questions.set(id, question.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH));
}
