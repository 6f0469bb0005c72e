// A strategy that is pointed at, or pressed, is followed through the figures and tables of its section.
for (const section of document.querySelectorAll("section.group")) {
  const parts = [...section.querySelectorAll("[data-strategy]")];
  const buttons = [...section.querySelectorAll(".legend button")];
  let pressed = null;
  const follow = (strategy) => {
    section.classList.toggle("following", strategy !== null);
    for (const part of parts) part.classList.toggle("followed", part.dataset.strategy === strategy);
  };
  for (const part of parts) {
    part.addEventListener("pointerenter", () => follow(part.dataset.strategy));
    part.addEventListener("pointerleave", () => follow(pressed));
  }
  for (const button of buttons) {
    button.addEventListener("focus", () => follow(button.dataset.strategy));
    button.addEventListener("blur", () => follow(pressed));
    button.addEventListener("click", () => {
      pressed = pressed === button.dataset.strategy ? null : button.dataset.strategy;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other.dataset.strategy === pressed));
      follow(pressed);
    });
  }
}
// A link to a row's cells opens them, and so does the address of the page.
const open = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", open);
for (const link of document.querySelectorAll('a[href*="-cells-"]')) link.addEventListener("click", () => setTimeout(open));
open();
