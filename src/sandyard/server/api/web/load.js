// Loads a page's module. A browser gives up what it is loading when the network of its own host
// changes, as it does where machines come and go, and a module of which one part did not come is
// not asked for again: the page is opened anew instead, a few times.

const MOST = 5;
const PAUSE_MS = 300;
const KEY = `sandyard-tries ${location.pathname}`;
const script = document.createElement("script");

script.type = "module";
script.src = document.currentScript.dataset.module;
script.addEventListener("load", () => sessionStorage.removeItem(KEY));
script.addEventListener("error", () => {
  const tries = Number(sessionStorage.getItem(KEY)) + 1;
  if (tries > MOST) {
    sessionStorage.removeItem(KEY);
    document.getElementById("said").textContent = "not all of this page came: open it again";
    return;
  }
  sessionStorage.setItem(KEY, String(tries));
  setTimeout(() => location.reload(), PAUSE_MS * tries);
});
document.body.append(script);
