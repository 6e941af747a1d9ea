// What this browser remembers, as JSON in localStorage. Without localStorage, only this tab remembers it.

const fallback = new Map();

export function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return fallback.get(key) ?? null;
  }
}

// Store a value under a key, or forget the key if the value is null.
export function write(key, value) {
  fallback.set(key, value);
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // The fallback has it.
  }
}

// Call back with each key that another tab changes.
export function onChange(callback) {
  addEventListener("storage", (event) => callback(event.key));
}

// The answer that is not yet stored in a conversation: `id` of its stream, its `prompt`, `parentId` (the last message
// when it was sent), and `questionId` if it is another answer to a stored question.
export const pendingKey = (conversation) => `pending ${conversation}`;

export const draftKey = (conversation) => `draft ${conversation}`;
