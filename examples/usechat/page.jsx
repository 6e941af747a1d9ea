// A chat with useChat, for the AI SDK 5, 6 and 7. The URL holds the id of the chat, so a reload and a second tab show it.

import { useChat } from "@ai-sdk/react";
import * as ai from "ai";
import { useEffect, useState } from "react";
import { createRoot } from "react-dom/client";

const route = (id) => `/api/chat/${encodeURIComponent(id)}`;

async function load(id) {
  const response = await fetch(route(id));
  if (response.status === 404) return { messages: [] }; // nothing has been sent yet
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

// The server ends the answer, in all tabs. `stop` of useChat would only disconnect this one.
const stop = (id) =>
  fetch(`${route(id)}/stop`, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });

// Whether the user has decided on all tool calls, so that the answer can continue.
const isDecided = (chat) =>
  ai.lastAssistantMessageIsCompleteWithToolCalls(chat) ||
  ai.lastAssistantMessageIsCompleteWithApprovalResponses?.(chat); // version 5 has no approvals

const textOf = ({ parts }) => parts.map((part) => (part.type === "text" ? part.text : "")).join("");

function Chat({ id, stored, isAnswering, draft, reopen }) {
  const transport = new ai.DefaultChatTransport({
    fetch: async (...request) => {
      const response = await fetch(...request);
      if (response.status === 204 && isAnswering) reopen(); // the answer has ended in the meantime: it is stored now
      return response;
    },
  });
  const chat = useChat({
    id,
    messages: stored,
    resume: true,
    transport,
    sendAutomaticallyWhen: isDecided,
    // Without this, versions 5 and 6 would append the replay to the text that they have.
    onFinish: ({ isDisconnect, messages }) => isDisconnect && reopen(messages),
  });
  const [prompt, setPrompt] = useState(draft);
  const [editedId, setEditedId] = useState();
  const isBusy = chat.status === "submitted" || chat.status === "streaming";

  function send(event) {
    event.preventDefault();
    if (isBusy || !prompt.trim()) return;
    chat.sendMessage(editedId ? { text: prompt, messageId: editedId } : { text: prompt });
    setPrompt("");
    setEditedId(undefined);
  }

  function edit(message) {
    setPrompt(textOf(message));
    setEditedId(message.id);
  }

  return (
    <>
      <main>
        {chat.messages.map((message) => (
          <article key={message.id} className={message.role}>
            {message.parts.map((part, index) => <Part key={index} part={part} chat={chat} />)}
            {!isBusy && (
              <footer>
                {message.role === "user"
                  ? <button onClick={() => edit(message)}>Edit</button>
                  : <button onClick={() => chat.regenerate({ messageId: message.id })}>Try again</button>}
              </footer>
            )}
          </article>
        ))}
        {chat.error && (
          <p role="alert">
            {chat.error.message} <button onClick={() => reopen(chat.messages)}>Reload</button>
          </p>
        )}
      </main>
      <form onSubmit={send} data-status={chat.status}>
        <input value={prompt} onChange={(event) => setPrompt(event.target.value)} aria-label="Message" autoFocus />
        {isBusy
          ? <button type="button" onClick={() => stop(id)}>Stop</button>
          : <button>{editedId ? "Save" : "Send"}</button>}
      </form>
    </>
  );
}

function Part({ part, chat }) {
  if (part.type === "text") return <p className="text">{part.text}</p>;
  if (!part.toolCallId) return null;
  const name = part.toolName ?? part.type.replace("tool-", "");
  const ask = (question, answer) => (
    <p className="tool">
      {question} <button onClick={() => answer(true)}>Yes</button> <button onClick={() => answer(false)}>No</button>
    </p>
  );
  if (part.state === "approval-requested") { // the server runs this tool if the user approves
    return ask(`Allow ${name} ${JSON.stringify(part.input)}?`, (approved) =>
      chat.addToolApprovalResponse({ id: part.approval.id, approved }));
  }
  if (name === "confirm" && part.state === "input-available") { // this page runs this tool
    return ask(part.input.question, (yes) =>
      chat.addToolOutput({ tool: name, toolCallId: part.toolCallId, output: yes ? "yes" : "no" }));
  }
  return <p className="tool">{name}: {part.errorText ?? JSON.stringify(part.output) ?? part.state}</p>;
}

function App() {
  const [chat, setChat] = useState();
  const [error, setError] = useState();

  // Show the chat of the URL as it is stored, and follow its running answer.
  async function open(shown = []) {
    if (location.hash.length < 2) history.replaceState(null, "", `#${crypto.randomUUID()}`);
    const id = decodeURIComponent(location.hash.slice(1));
    try {
      const { messages, activeStreamId } = await load(id);
      const question = shown.findLast(({ role }) => role === "user");
      const isLost = question && !messages.some((message) => message.id === question.id);
      const draft = isLost ? textOf(question) : "";
      setChat({ opened: crypto.randomUUID(), id, stored: messages, isAnswering: Boolean(activeStreamId), draft });
      setError(undefined);
    } catch (error) {
      setError(error);
      setTimeout(open, 1000, shown);
    }
  }

  useEffect(() => {
    const openNew = () => open();
    openNew();
    addEventListener("hashchange", openNew);
    return () => removeEventListener("hashchange", openNew);
  }, []);

  return (
    <>
      <header>
        <h1>Chat</h1>
        <a href="#">New chat</a>
      </header>
      {error && <p role="alert">{error.message}</p>}
      {chat && <Chat key={chat.opened} {...chat} reopen={open} />}
    </>
  );
}

createRoot(document.getElementById("root")).render(<App />);
