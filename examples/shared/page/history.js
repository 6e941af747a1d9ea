// The messages of a conversation, which the server sends as a tree: `{nodes, rootIds, activeLeafId}`. A question has the
// id of the stream that answers it as `metadata.streamId`. The message with the answer has the same id.

const siblings = ({ nodes, rootIds }, parentId) => (parentId === null ? rootIds : nodes[parentId].children);

// Return the messages of the current path.
export function currentPath(history) {
  const path = [];
  for (let id = history.activeLeafId; id !== null; id = path.at(-1).parentId) {
    const { parentId, message, metadata } = history.nodes[id];
    const alternatives = siblings(history, parentId);
    path.push({
      id,
      parentId,
      role: message.role,
      content: message.content,
      state: metadata?.state ?? "done",
      streamId: metadata?.streamId ?? null,
      isUnanswered: message.role === "user" && id === history.activeLeafId && !(metadata?.streamId in history.nodes),
      alternative: alternatives.indexOf(id) + 1,
      alternatives: alternatives.length,
    });
  }
  return path.reverse();
}

// Return the end of the path through another alternative of a message: `step` alternatives after it.
export function leafOfAlternative(history, { id, parentId }, step) {
  const alternatives = siblings(history, parentId);
  let leaf = alternatives[alternatives.indexOf(id) + step];
  while (history.nodes[leaf].children.length) [leaf] = history.nodes[leaf].children;
  return leaf;
}
