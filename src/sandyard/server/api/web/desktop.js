// A desktop of a sandbox, by noVNC. The address may bring a ticket, good for once; else, and to come
// back, a key is asked for.

import RFB from "/web/vendor/novnc/core/rfb.js";
import { ask, known } from "/web/key.js";

const WAITS_S = [0.5, 1, 2, 4, 8, 15];
const name = decodeURIComponent(location.pathname.split("/").pop());
const said = document.getElementById("said");
const screen = document.getElementById("screen");
const fit = document.getElementById("fit");
const again = document.getElementById("again");

let given = new URLSearchParams(location.hash.slice(1)).get("ticket");
let rfb = null;
let failed = 0;
let copied = "";

document.title = `${name}: desktop`;
document.getElementById("name").textContent = name;
history.replaceState(null, "", location.pathname); // a ticket is of no use to whoever comes later

async function ticket() {
  const found = given;
  given = null;
  if (found) return found;
  const made = await ask("GET", `/v1/sandboxes/${encodeURIComponent(name)}/vnc`);
  return new URLSearchParams(new URL(made.url).hash.slice(1)).get("ticket");
}

async function open() {
  said.textContent = "connecting …";
  try {
    connect(await ticket());
  } catch (error) {
    if (error.status !== undefined && error.status < 500) said.textContent = error.message;
    else later();
  }
}

function connect(secret) {
  const where = new URL(`/v1/desktop/sessions/${secret}`, location.href);
  where.protocol = where.protocol.replace("http", "ws");
  screen.replaceChildren();
  rfb = new RFB(screen, where.href, { shared: true });
  rfb.scaleViewport = true;
  rfb.resizeSession = fit.getAttribute("aria-pressed") === "true";
  rfb.background = "#111";
  rfb.addEventListener("connect", () => {
    failed = 0;
    said.textContent = "";
    rfb.focus();
  });
  rfb.addEventListener("disconnect", ended);
  rfb.addEventListener("credentialsrequired", () => rfb.disconnect());
  rfb.addEventListener("clipboard", (event) => {
    copied = event.detail.text;
    said.textContent = "something was copied in the sandbox";
  });
}

// A sandbox that was paused is not woken by a page that nobody looks at.
async function ended() {
  rfb = null;
  let why = "the connection has ended";
  if (known()) {
    try {
      const box = await ask("GET", `/v1/sandboxes/${encodeURIComponent(name)}`);
      if (box.status === "running") {
        later();
        return;
      }
      why = `it is ${box.status}${box.statusReason ? `: ${box.statusReason.message}` : ""}`;
    } catch (error) {
      if (error.status === undefined || error.status >= 500) {
        later();
        return;
      }
      why = error.message;
    }
  }
  said.textContent = why;
  again.hidden = false;
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
