// How a page looks: kept for this browser.

const PREFIX = "sandyard-look ";

export function remembered(what, otherwise) {
  return localStorage.getItem(PREFIX + what) ?? otherwise;
}

export function remember(what, value) {
  localStorage.setItem(PREFIX + what, value);
}

// Has a field choose between the system's colours, light and dark; `apply` is told which it is.
export function themed(field, apply) {
  const system = matchMedia("(prefers-color-scheme: light)");
  const show = () => {
    const theme = field.value === "system" ? (system.matches ? "light" : "dark") : field.value;
    document.documentElement.dataset.theme = theme;
    apply(theme);
  };
  field.value = remembered("theme", "system");
  field.onchange = () => {
    remember("theme", field.value);
    show();
  };
  system.addEventListener("change", show);
  show();
}
