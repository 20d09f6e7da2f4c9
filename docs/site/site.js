// What the theme leaves without names, out of the keyboard's reach, or broken into "--" and the rest of a flag.
const complete = () => {
  document.querySelectorAll(".md-code__nav").forEach((nav, number) => {
    nav.setAttribute("aria-label", `Code ${number + 1}`);
  });
  document.querySelectorAll(".highlight code, .doc-signature code, .md-typeset__scrollwrap").forEach((part) => {
    // Only what scrolls is worth a stop of the tab key.
    part.removeAttribute("tabindex");
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  });
  document.querySelectorAll(".md-typeset :not(pre) > code").forEach((code) => {
    if (code.textContent.length <= 30) code.style.whiteSpace = "nowrap";
  });
};

new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", complete);
complete();
