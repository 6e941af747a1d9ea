// Requests to the server. Each function throws an `Error` with a text for the user if its request fails.

const STREAM = "/__aibind__/stream";
const RETRY = 2000; // milliseconds

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function request(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    throw new Error(error ?? `the server responded with status ${response.status}`);
  }
  return response;
}

const path = (...parts) => ["/conversation", ...parts.map(encodeURIComponent)].join("/");
const json = async (...parameters) => (await request(...parameters)).json();

// Return the messages of the current path.
export const loadMessages = (conversation) => json("GET", path(conversation));

// Run an action on a message (see messages.py), and return the messages of the new path.
export const change = (conversation, action, id) => json("POST", path(conversation, action, id), {});

export const deleteConversation = (conversation) => request("DELETE", path(conversation));

export const stop = (stream) => request("POST", `${STREAM}/stop`, { id: stream });

// Send a prompt, and return the id of the stream of the answer.
export async function ask(conversation, prompt) {
  const response = await request("POST", STREAM, { prompt, sessionId: conversation });
  // The server stores the answer without a reader. An EventSource reads it, as after a reload.
  await response.body.cancel();
  return response.headers.get("X-Stream-Id");
}

// Ask for another answer to a question, and return the id of its stream.
export async function askAgain(conversation, question) {
  return (await json("POST", path(conversation, "answer", question), {})).id;
}

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
  const url = () => `${STREAM}/resume?id=${encodeURIComponent(stream)}&after=${lastEventId}`;

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
