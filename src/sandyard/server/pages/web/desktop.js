// A desktop of a sandbox, by noVNC. The address may bring a ticket, good for once; else, and to come
// back, a key is asked for.

import Inflate from "/web/vendor/novnc/core/inflator.js";
import RFB from "/web/vendor/novnc/core/rfb.js";
import { ask, known } from "/web/key.js";

const AREA_MAX = 4096 * 2304;
const SIDE_MAX = 8192;
const TEXT_MAX = 1024 * 1024;
const SIZES_MAX = 30; // within SIZES_MS
const SIZES_MS = 10_000;
const WAITS_S = [0.5, 1, 2, 4, 8, 15];
const name = decodeURIComponent(location.pathname.split("/").pop());
const said = document.getElementById("said");
const screen = document.getElementById("screen");
const fit = document.getElementById("fit");
const again = document.getElementById("again");

let isGiven = false; // whether the connection was opened by a ticket of the address
let given = new URLSearchParams(location.hash.slice(1)).get("ticket");
let rfb = null;
let failed = 0;
let copied = "";

document.title = `${name}: desktop`;
document.getElementById("name").textContent = name;
history.replaceState(null, "", location.pathname); // a ticket is of no use to whoever comes later

// noVNC unpacks as much as a screen says there is: pixels of a picture, or a text.
const unpack = Inflate.prototype.inflate;
let unpackedMax = AREA_MAX * 4;
Inflate.prototype.inflate = function (expected) {
  if (!(expected >= 0 && expected <= unpackedMax)) throw new Error("what it has packed is too much");
  return unpack.call(this, expected);
};

// What a screen says is a guest's, and noVNC believes how large it is: a page would stand still for
// minutes over a picture of 65535 by 65535.
class Screen extends RFB {
  fault = null; // what of that made no sense
  reason = ""; // why the server closed the connection
  hasOpened = false;
  #isReading = false;
  #sizedAt = [];

  _resize(width, height) {
    if (!(width > 0 && width <= SIDE_MAX && height > 0 && height <= SIDE_MAX && width * height <= AREA_MAX))
      throw new Error(`it says that it is ${width} by ${height} large`);
    const now = performance.now();
    this.#sizedAt = [...this.#sizedAt.filter((at) => now - at < SIZES_MS), now];
    if (this.#sizedAt.length > SIZES_MAX) throw new Error("it changes its size without end");
    super._resize(width, height);
  }

  _handleServerCutText() {
    unpackedMax = TEXT_MAX;
    try {
      return super._handleServerCutText();
    } finally {
      unpackedMax = AREA_MAX * 4;
    }
  }

  _handleRect() {
    const { x, y, width, height, encoding } = this._FBU;
    // Below 0 are those that draw nothing there: sizes, pointers, and the like.
    if (encoding >= 0 && (x + width > this._fbWidth || y + height > this._fbHeight))
      throw new Error("it draws beside the picture");
    return super._handleRect();
  }

  _handleMessage() {
    this.#isReading = true;
    try {
      super._handleMessage();
    } catch (error) {
      this._fail(error.message);
    }
    this.#isReading = false;
  }

  _fail(details) {
    if (this.#isReading) this.fault ??= details;
    return super._fail(details);
  }

  _socketClose(event) {
    this.reason = event.reason;
    super._socketClose(event);
  }
}

async function ticket() {
  const found = given;
  given = null;
  isGiven = Boolean(found);
  if (found) return found;
  const made = await ask("GET", `/v1/sandboxes/${encodeURIComponent(name)}/vnc`);
  return new URLSearchParams(new URL(made.url).hash.slice(1)).get("ticket");
}

async function open() {
  said.textContent = "connecting …";
  try {
    connect(await ticket());
  } catch (error) {
    if (error.status !== undefined && error.status < 500) stop(error.message);
    else later();
  }
}

// What goes wrong in noVNC where nobody catches it, such as with a message that never ends.
window.addEventListener("error", (event) => {
  if (rfb === null) return;
  rfb.fault ??= event.message;
  rfb.disconnect();
});

function connect(secret) {
  const where = new URL(`/v1/desktop/sessions/${secret}`, location.href);
  where.protocol = where.protocol.replace("http", "ws");
  screen.replaceChildren();
  const opened = new Screen(screen, where.href, { shared: true });
  rfb = opened;
  rfb.scaleViewport = true;
  rfb.resizeSession = fit.getAttribute("aria-pressed") === "true";
  rfb.background = "#111";
  rfb.addEventListener("connect", () => {
    failed = 0;
    opened.hasOpened = true;
    said.textContent = "";
    rfb.focus();
  });
  rfb.addEventListener("disconnect", () => ended(opened));
  rfb.addEventListener("credentialsrequired", () => rfb.disconnect());
  rfb.addEventListener("clipboard", (event) => {
    copied = event.detail.text;
    said.textContent = "something was copied in the sandbox";
  });
}

function stop(why) {
  said.textContent = why;
  said.title = why;
  again.hidden = false;
}

// A sandbox that was paused is not woken by a page that nobody looks at.
async function ended({ fault, reason, hasOpened }) {
  rfb = null;
  if (fault) {
    stop(`this screen cannot be shown (${fault}); if it stays so, restart the sandbox`);
    return;
  }
  if (!known()) {
    const why = isGiven && !hasOpened ? "this link was used already, or is older than a minute" : reason;
    stop(`${why || "the connection has ended"}; open it again with an API key, or ask for a new link`);
    return;
  }
  try {
    const box = await ask("GET", `/v1/sandboxes/${encodeURIComponent(name)}`);
    if (box.status === "running") later();
    else if (box.status === "paused") stop("it is paused; opening it again resumes it");
    else stop(`it is ${box.status}${box.statusReason ? `: ${box.statusReason.message}` : ""}`);
  } catch (error) {
    if (error.status === undefined || error.status >= 500) later();
    else if (error.status === 404) stop("it was deleted, or its name has changed");
    else stop(error.message);
  }
}

again.onclick = () => {
  again.hidden = true;
  open();
};

function later() {
  const wait = WAITS_S[Math.min(failed, WAITS_S.length - 1)];
  failed += 1;
  said.textContent = "the connection broke; coming back …";
  setTimeout(open, wait * 1000);
}

document.getElementById("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(copied);
    said.textContent = copied ? "copied" : "nothing was copied in the sandbox yet";
  } catch {
    prompt("Copy it from here:", copied);
  }
};
document.getElementById("paste").onclick = async () => {
  let text = null;
  try {
    text = await navigator.clipboard.readText();
  } catch {
    text = prompt("Paste it here:");
  }
  if (text && rfb) {
    rfb.clipboardPasteFrom(text);
    said.textContent = "it is on the sandbox's clipboard";
    rfb.focus();
  }
};
fit.onclick = () => {
  const fits = fit.getAttribute("aria-pressed") !== "true";
  fit.setAttribute("aria-pressed", String(fits));
  if (rfb) rfb.resizeSession = fits;
};
document.getElementById("full").onclick = () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else document.documentElement.requestFullscreen();
};

open();
