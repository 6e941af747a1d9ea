// Measures the page by its computed styles and boxes. Evaluates to an object of functions.
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

  // Return red, green, blue (0 to 255) and alpha (0 to 1) of a CSS colour.
  function parse(color) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  }

  const over = (front, back) => [0, 1, 2].map((i) => front[i] * front[3] + back[i] * (1 - front[3]));

  function luminance(color) {
    const [red, green, blue] = color.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  function ratio(front, back) {
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }

  function ancestors(element) {
    return element ? [...ancestors(element.parentElement), element] : [];
  }

  const background = (element) =>
    ancestors(element).reduce((back, each) => over(parse(getComputedStyle(each).backgroundColor), back), [255, 255, 255]);

  // Return the contrast of a colour with the background of an element. Translucent ancestors weaken it.
  function contrast(color, element) {
    const back = background(element);
    const [red, green, blue, alpha] = parse(color);
    const opacity = ancestors(element).reduce((product, each) => product * getComputedStyle(each).opacity, alpha);
    return ratio(over([red, green, blue, opacity], back), back);
  }

  const isVisible = (element) =>
    element.checkVisibility({ checkVisibilityCSS: true, checkOpacity: true }) && !element.closest(".visually-hidden, [inert]");

  const describe = (element) =>
    `${element.localName}${element.id && `#${element.id}`} “${(element.ariaLabel || element.innerText || "").slice(0, 40)}”`;

  const root = document.querySelector("dialog[open]") ?? document.body; // a dialog disables everything else
  const all = (selector) => [...root.querySelectorAll(selector)].filter(isVisible);
  const CONTROLS = "button, textarea, nav a";

  return {
    // The contrast of each visible text, of placeholders, and of nothing that is disabled.
    texts() {
      const found = [];
      const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !isVisible(parent) || parent.closest(":disabled, #skip:not(:focus)")) continue;
        found.push([describe(parent), contrast(getComputedStyle(parent).color, parent)]);
      }
      for (const box of all("textarea")) {
        found.push(["placeholder", contrast(getComputedStyle(box, "::placeholder").color, box)]);
        found.push(["textarea", contrast(getComputedStyle(box).color, box)]);
      }
      return found;
    },

    // The contrast of each control: of its text, icon, border or fill, whichever is the highest.
    controls() {
      return all(CONTROLS).filter((each) => !each.disabled).map((control) => {
        const shape = control.localName === "textarea" ? control.closest("form") : control;
        const style = getComputedStyle(shape);
        const values = [];
        if (parseFloat(style.borderTopWidth) > 0) values.push(contrast(style.borderTopColor, shape.parentElement));
        values.push(ratio(background(shape), background(shape.parentElement)));
        if (control.querySelector("svg")) values.push(contrast(getComputedStyle(control.querySelector("svg")).stroke, control));
        if (control.innerText?.trim()) values.push(contrast(getComputedStyle(control).color, control));
        return [describe(control), Math.max(...values)];
      });
    },

    // The contrast of the focus indicator of each element that the keyboard reaches, 0 if it has none.
    focus() {
      const before = document.activeElement;
      const found = all("button:not(:disabled), textarea, a[href], [tabindex]").map((element) => {
        document.activeElement.blur(); // a focus that came by the mouse has no indicator
        element.focus({ focusVisible: true, preventScroll: true });
        const shape = element.localName === "textarea" ? element.closest("form") : element;
        const style = getComputedStyle(shape);
        const color = shape === element ? style.outlineColor : style.borderTopColor;
        const drawn = shape !== element || (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2);
        const around = parseFloat(style.outlineOffset) < 0 ? shape : shape.parentElement;
        return [describe(element), drawn ? contrast(color, around) : 0];
      });
      before.focus();
      return found;
    },

    // The smaller side of each control, in pixels. Links in a text are excepted, as in WCAG.
    targets() {
      return all(CONTROLS).map((control) => {
        const { width, height } = control.getBoundingClientRect();
        return [describe(control), Math.min(width, height)];
      });
    },

    // The elements that are cut off at a side of the window, or whose content is wider than they are.
    cut() {
      const scrolls = (element) =>
        ancestors(element.parentElement).some((each) => each.matches(".code pre, .table"));
      const found = all("*").filter((element) => {
        const { left, right, width } = element.getBoundingClientRect();
        if (!width || element.closest("svg, #skip") || scrolls(element)) return false;
        return left < -0.5 || right > innerWidth + 0.5;
      });
      // Texts have no boxes of their own, but they widen the content of their element.
      const clipped = all("*").filter((element) =>
        element.clientWidth > 0 &&
        element.scrollWidth > element.clientWidth + 1 &&
        !element.matches(".code pre, .table") &&
        getComputedStyle(element).textOverflow !== "ellipsis");
      const page = document.documentElement.scrollWidth > innerWidth ? [document.documentElement] : [];
      return [...page, ...found, ...clipped].map(describe);
    },
  };
})()
