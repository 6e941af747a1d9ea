// The drafts of this browser, as JSON in localStorage. Without localStorage, only this tab remembers them.

const fallback = new Map();

export const draftKey = (conversation) => `draft ${conversation}`;

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
