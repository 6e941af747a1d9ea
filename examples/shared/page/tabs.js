// Messages between the tabs of this browser.

const channel = new BroadcastChannel("conversations");

// Tell the other tabs that a conversation has changed.
export const tell = (id) => channel.postMessage(id);

// Call back with the id of each conversation that another tab changes.
export function onTold(callback) {
  channel.onmessage = ({ data }) => callback(data);
}
