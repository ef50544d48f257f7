// Loads a page's module. A browser gives up what it is loading when the network of its own host
// changes, as it does where machines come and go, and a module of which one part did not come is
// not asked for again: the page is opened anew instead, a few times. This lies within the page.

const MOST = 5;
const PAUSE_MS = 300;
const TRIES = `sandyard-tries ${location.pathname}`;
const script = document.createElement("script");

async function anew() {
  const tries = Number(sessionStorage.getItem(TRIES)) + 1;
  if (tries > MOST) {
    sessionStorage.removeItem(TRIES);
    document.getElementById("said").textContent = "not all of this page came: open it again";
    return;
  }
  sessionStorage.setItem(TRIES, String(tries));
  await new Promise((resolve) => setTimeout(resolve, PAUSE_MS * tries));
  try {
    await fetch(location.href, { cache: "no-store" }); // a page that does not come has no second try
    location.reload();
  } catch {
    anew();
  }
}

script.type = "module";
script.src = document.currentScript.dataset.module;
script.addEventListener("error", anew);
script.addEventListener("load", () => sessionStorage.removeItem(TRIES));
document.body.append(script);

// A script waits for the style sheets before it: one that is not there now did not come.
for (const one of document.querySelectorAll("link[rel=stylesheet]"))
  if (!one.sheet) one.replaceWith(one.cloneNode());
