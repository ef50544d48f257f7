// A terminal in a sandbox. A shell outlives its connection: who is cut off comes back to it, from
// the byte on that was shown last.

import { Terminal } from "/web/vendor/xterm/xterm.mjs";
import { FitAddon } from "/web/vendor/xterm/addon-fit.mjs";
import { ask } from "/web/key.js";

const PIECE = 64 * 1024;
const WAITS_S = [0.5, 1, 2, 4, 8, 15];
const name = decodeURIComponent(location.pathname.split("/").pop());
const said = document.getElementById("said");
const again = document.getElementById("again");
const terminal = new Terminal({ cursorBlink: true, fontSize: 14, scrollback: 10000 });
const fit = new FitAddon();
const encoder = new TextEncoder();

let socket = null;
let shell; // the terminal's name at the server, once there is one
let shown = 0; // how many of its bytes were shown
let failed = 0;

document.title = `${name}: terminal`;
document.getElementById("name").textContent = name;
terminal.loadAddon(fit);
terminal.open(document.getElementById("screen"));
fit.fit();
new ResizeObserver(() => fit.fit()).observe(document.getElementById("screen"));
terminal.onResize(({ cols, rows }) => send(JSON.stringify({ type: "resize", cols, rows })));
terminal.onData((text) => type(encoder.encode(text)));
terminal.onBinary((text) => type(Uint8Array.from(text, (one) => one.charCodeAt(0))));
again.onclick = () => {
  again.hidden = true;
  shell = undefined;
  shown = 0;
  terminal.reset();
  open();
};

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(message);
}

function type(bytes) {
  for (let start = 0; start < bytes.length; start += PIECE) send(bytes.slice(start, start + PIECE));
}

function end(why) {
  said.textContent = why;
  again.hidden = false;
  terminal.blur();
}

async function open() {
  said.textContent = "connecting …";
  try {
    const made = await ask("POST", "/v1/terminal/sandbox-sessions", { sandboxId: name, terminalId: shell });
    connect(made, shell !== undefined);
    shell = made.terminalId;
  } catch (error) {
    if (error.status !== undefined && error.status < 500) end(error.message);
    else later();
  }
}

function connect(made, isBack) {
  const query = new URLSearchParams({ cols: terminal.cols, rows: terminal.rows });
  if (isBack) query.set("offset", shown);
  const where = new URL(`${made.wsPath}?${query}`, location.href);
  where.protocol = where.protocol.replace("http", "ws");
  let ended = null;
  socket = new WebSocket(where);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    failed = 0;
    said.textContent = "";
    if (isBack) send(JSON.stringify({ type: "resize", cols: terminal.cols, rows: terminal.rows }));
    terminal.focus();
  };
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") {
      shown += data.byteLength;
      terminal.write(new Uint8Array(data));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "exit") ended = `the shell has ended (${message.exitCode})`;
    else if (message.type === "error") ended = message.message;
  };
  socket.onclose = () => {
    if (ended !== null) end(ended);
    else later();
  };
}

function later() {
  const wait = WAITS_S[Math.min(failed, WAITS_S.length - 1)];
  failed += 1;
  said.textContent = "the connection broke; coming back …";
  setTimeout(open, wait * 1000);
}

open();
