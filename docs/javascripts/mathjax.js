// pymdownx.arithmatex wraps every formula in class "arithmatex" with \(...\) or \[...\] inside;
// MathJax looks there and nowhere else, so a dollar sign in a listing stays a dollar sign.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
