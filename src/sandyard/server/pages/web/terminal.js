// A terminal in a sandbox. A shell outlives its connection: who is cut off comes back to it, from
// the byte on that was shown last, and who loads the page again, to what of it is still kept.

import { Terminal } from "/web/vendor/xterm/xterm.mjs";
import { FitAddon } from "/web/vendor/xterm/addon-fit.mjs";
import { ask } from "/web/key.js";
import { remember, remembered, themed } from "/web/look.js";

const PIECE = 64 * 1024;
const WAITS_S = [0.5, 1, 2, 4, 8, 15];
const name = decodeURIComponent(location.pathname.split("/").pop());
const said = document.getElementById("said");
const again = document.getElementById("again");
const KEPT = `sandyard-terminal ${name}`;
const SIZES = [10, 11, 12, 13, 14, 16, 18, 20, 24, 28];
const THEMES = {
  dark: { background: "#111111", foreground: "#dddddd", cursor: "#dddddd" },
  light: {
    background: "#ffffff", foreground: "#23262b", cursor: "#23262b", cursorAccent: "#ffffff",
    selectionBackground: "#cfe0f5", black: "#23262b", red: "#b3261e", green: "#2a6e31",
    yellow: "#7d5a00", blue: "#1c5bb8", magenta: "#8a3ea8", cyan: "#12686f", white: "#5d636b",
    brightBlack: "#6f757d", brightRed: "#c9372c", brightGreen: "#36823d", brightYellow: "#946b00",
    brightBlue: "#2f6fd0", brightMagenta: "#9c50ba", brightCyan: "#1b7c84", brightWhite: "#3b4047",
  },
};
const terminal = new Terminal({
  cursorBlink: true, fontSize: Number(remembered("size", 14)), scrollback: 10000,
});
const fit = new FitAddon();
const encoder = new TextEncoder();

let socket = null;
// The terminal's name at the server, once there is one; kept for this tab.
let shell = sessionStorage.getItem(KEPT) ?? undefined;
let isReload = shell !== undefined;
let shown = 0; // how many of its bytes were shown
let failed = 0;
let refused = 0;

call(name);
themed(document.getElementById("theme"), (theme) => (terminal.options.theme = THEMES[theme]));
document.getElementById("smaller").onclick = () => resize(-1);
document.getElementById("larger").onclick = () => resize(1);
terminal.loadAddon(fit);
terminal.open(document.getElementById("screen"));
fit.fit();
new ResizeObserver(() => fit.fit()).observe(document.getElementById("screen"));
terminal.onResize(({ cols, rows }) => send(JSON.stringify({ type: "resize", cols, rows })));
terminal.onData((text) => type(encoder.encode(text)));
terminal.onBinary((text) => type(Uint8Array.from(text, (one) => one.charCodeAt(0))));
again.onclick = () => {
  again.hidden = true;
  anew();
};

function call(text) {
  document.title = `${text}: terminal`;
  document.getElementById("name").textContent = text;
}

function resize(step) {
  const place = SIZES.findIndex((one) => one >= terminal.options.fontSize);
  terminal.options.fontSize = SIZES[Math.min(Math.max(place + step, 0), SIZES.length - 1)];
  remember("size", terminal.options.fontSize);
  fit.fit();
  terminal.focus();
}

function anew() {
  sessionStorage.removeItem(KEPT);
  shell = undefined;
  isReload = false;
  refused = 0;
  shown = 0;
  terminal.reset();
  open();
}

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
    sessionStorage.setItem(KEPT, shell);
    nameIt(made.sandboxId);
  } catch (error) {
    if (error.status !== undefined && error.status < 500) end(error.message);
    else later();
  }
}

// The address may have the sandbox's id; people know it by its name.
async function nameIt(id) {
  try {
    const box = await ask("GET", `/v1/sandboxes/${id}`);
    call(box.name ?? box.id);
  } catch {
    // A key for terminals alone may not look; the id will do.
  }
}

function connect(made, isBack) {
  const query = new URLSearchParams({ cols: terminal.cols, rows: terminal.rows });
  if (isBack) query.set("offset", shown);
  const where = new URL(`${made.wsPath}?${query}`, location.href);
  where.protocol = where.protocol.replace("http", "ws");
  let ended = null;
  let hasOpened = false;
  let hasShown = false;
  socket = new WebSocket(where);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    failed = 0;
    refused = 0;
    hasOpened = true;
    said.textContent = "";
    if (isBack) send(JSON.stringify({ type: "resize", cols: terminal.cols, rows: terminal.rows }));
    terminal.focus();
  };
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") {
      shown += data.byteLength;
      if (data.byteLength > 0) {
        hasShown = true;
        isReload = false;
      }
      terminal.write(new Uint8Array(data));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "offset") shown = message.offset;
    else if (message.type === "exit") {
      ended = `the shell has ended (${message.exitCode})`;
      sessionStorage.removeItem(KEPT); // a page that is loaded again has a new one
    }
    else if (message.type === "error") ended = message.message;
  };
  socket.onclose = () => {
    // A browser does not tell why it was not let in. The server is there, for it gave a ticket: it
    // is the shell that is not.
    if (!hasOpened && isBack) refused += 1;
    if (refused > 1) ended = "the shell has ended";
    if (ended !== null && isReload && !hasShown) anew();
    else if (ended !== null) end(ended);
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
