// Renews the page's <main> while a run goes on; what is open, chosen and in view stays.
(() => {
  const every = 1000;
  let missed = 0;
  const status = document.createElement("p");
  status.id = "live";
  status.setAttribute("role", "status");
  document.body.classList.add("live");
  document.body.append(status);
  const say = (text) => { if (status.textContent !== text) status.textContent = text; };
  const key = (details, i) => i + details.querySelector("summary").textContent;

  async function renew() {
    const text = await (await fetch("./", { cache: "no-store" })).text();
    const next = new DOMParser().parseFromString(text, "text/html");
    const open = new Set([...document.querySelectorAll("details")]
      .map((d, i) => d.open ? key(d, i) : null));
    const chosen = document.querySelector("input[name=by]:checked")?.id;
    const { scrollX, scrollY } = window;
    const style = next.querySelector("style");
    if (style && !document.querySelector("style")) document.head.append(style);
    document.title = next.title;
    document.querySelector("main").replaceWith(next.querySelector("main"));
    [...document.querySelectorAll("details")].forEach((d, i) => { d.open = open.has(key(d, i)); });
    const radio = chosen && document.getElementById(chosen);
    if (radio) radio.checked = true;
    window.scrollTo(scrollX, scrollY);
  }

  async function look() {
    try {
      const now = await (await fetch("version", { cache: "no-store" })).json();
      missed = 0;
      if (now.version !== live.version) { await renew(); live.version = now.version; }
      if (now.ended) { say("The run has ended: this is its last page."); return; }
      say("Live: renewed as steps arrive.");
    } catch {
      missed += 1;
      if (missed > 5) { say("No longer served: the page stays as it was."); return; }
    }
    setTimeout(look, every);
  }
  if (live.ended) say("The run has ended: this is its last page."); else look();
})();
