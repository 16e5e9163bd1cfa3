"use strict";
const still = matchMedia("(prefers-reduced-motion: reduce)");
for (const button of document.querySelectorAll("button.play")) {
  const video = button.querySelector("video");
  let pinned = false;
  const show = (on) => {
    button.classList.toggle("playing", on);
    if (on) { video.play().catch(() => {}); } else { video.pause(); video.currentTime = 0; }
  };
  const pin = (on) => { pinned = on; button.setAttribute("aria-pressed", String(on)); show(on); };
  button.addEventListener("click", () => pin(!pinned));
  button.addEventListener("keydown", (event) => { if (event.key === "Escape") { pin(false); } });
  button.addEventListener("mouseenter", () => { if (!still.matches) { show(true); } });
  button.addEventListener("mouseleave", () => { if (!pinned) { show(false); } });
}
