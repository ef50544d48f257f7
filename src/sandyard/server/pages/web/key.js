// Who is looking: an API key, asked for once and kept for this tab alone.

const KEPT = "sandyard-key";

export function known() {
  return sessionStorage.getItem(KEPT);
}

export function forget() {
  sessionStorage.removeItem(KEPT);
}

// Resolves to a key, once there is one; `why` is said above the field.
export function asked(why = "") {
  const form = document.getElementById("who");
  const field = form.elements.key;
  document.getElementById("why").textContent = why;
  form.hidden = false;
  field.focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      const key = field.value.trim();
      if (!key) return;
      field.value = "";
      form.hidden = true;
      sessionStorage.setItem(KEPT, key);
      resolve(key);
    };
  });
}

// Asks the API for something, and for another key as long as the one that is known is no good.
export async function ask(method, path, body) {
  for (let why = ""; ; ) {
    const key = known() ?? (await asked(why));
    const answer = await fetch(path, {
      method,
      headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    const said = await answer.json();
    if (answer.ok) return said.data;
    const error = new Error(said.error.message);
    error.status = answer.status;
    if (answer.status !== 401) throw error;
    forget();
    why = said.error.message;
  }
}
