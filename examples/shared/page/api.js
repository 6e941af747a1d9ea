// Requests to the routes of the handler. Each function throws an `Error` with a text for the user if its request fails,
// and with the HTTP status as `status`, if there was a response.

const PREFIX = "/__aibind__";
const RETRY = 2000; // milliseconds
const PAGE = 200; // conversations in one response, the most that the server sends

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function request(method, path, body) {
  const response = await fetch(PREFIX + path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    const text = error ?? `the server responded with status ${response.status}`;
    throw Object.assign(new Error(text), { status: response.status });
  }
  return response;
}

const json = async (...parameters) => (await request(...parameters)).json();
const conversation = (id) => `/conversations/${encodeURIComponent(id)}`;

// Return the result of a request, or null if the conversation does not exist, or belongs to another browser.
async function unlessMissing(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

// Return all conversations of this browser without their messages, the last saved one first.
export async function listConversations() {
  const found = [];
  for (let next = ""; next !== null; ) {
    const page = await json("GET", `/conversations?limit=${PAGE}&before=${encodeURIComponent(next)}`);
    found.push(...page.conversations);
    next = page.next;
  }
  return found;
}

// Return a conversation with its messages (see history.js), or null.
export const loadConversation = (id) => unlessMissing(json("GET", conversation(id)));

// Change the fields `title` or `activeLeafId` of a conversation.
export const changeConversation = (id, fields) => json("PATCH", conversation(id), fields);

// Delete a conversation, and stop its running answer. It may be deleted already.
export const deleteConversation = (id) => unlessMissing(json("DELETE", conversation(id)));

export const stop = (stream) => json("POST", "/stream/stop", { id: stream });

// Ask for an answer, and return the id of its stream. The fields are `prompt` and `parentId`, the message before the
// question or null, or for another answer `regenerate` and the question as `parentId`.
export async function ask(id, fields) {
  const response = await request("POST", "/stream", { sessionId: id, ...fields });
  // The server stores the answer without a reader. An EventSource reads it, as after a reload.
  await response.body.cancel();
  return response.headers.get("X-Stream-Id");
}

export const askTitle = async (messages) => (await request("POST", "/title", { messages })).text();

// Read an answer from its beginning until it has ended. The callbacks are:
// - onText(text): the next piece of the answer
// - onLost(), onConnected(): the connection is lost, or there again
// - onEnd(outcome): a text for the user, "" if the answer is complete, and whether the stream was missing
// Returns a function that stops reading.
export function followAnswer(stream, { onText, onLost, onConnected, onEnd }) {
  let source;
  let timer;
  let closed = false;
  let lastEventId = 0;
  let outcome = "";
  const url = () => `${PREFIX}/stream/resume?id=${encodeURIComponent(stream)}&after=${lastEventId}`;

  function close() {
    closed = true;
    clearTimeout(timer);
    source.close();
  }

  function end(text, missing = false) {
    if (closed) return;
    close();
    onEnd(text, missing);
  }

  function open() {
    // The browser reconnects an EventSource by itself and sends the id of the last event.
    source = new EventSource(url());
    source.onopen = onConnected;
    source.onmessage = (event) => {
      lastEventId = event.lastEventId;
      onText(event.data);
    };
    source.addEventListener("stopped", () => { outcome = "Stopped."; });
    source.addEventListener("done", () => end(outcome));
    source.addEventListener("error", async (event) => {
      if (event.data !== undefined) { // the stream's own error event, not a connection error
        outcome = `The answer is incomplete: ${event.data}`;
        return;
      }
      onLost();
      if (source.readyState !== EventSource.CLOSED) return;
      // An HTTP error, for example of a proxy: the browser does not reconnect.
      const probe = new AbortController();
      const response = await fetch(url(), { signal: probe.signal }).catch(() => null);
      probe.abort();
      if (response?.status === 404) end("This answer was deleted or has expired.", true);
      else if (!closed) timer = setTimeout(open, RETRY);
    });
  }

  open();
  return close;
}
