// The message that is being written: its text and its pictures, however they come.

import { byId, el } from "./dom.js";

const text = byId("message");
let pictures = [];
/** Of pictures that are added: a message that is sent meanwhile has them too. */
let reading = Promise.resolve();

/** The message as it stands. */
export const draft = () => ({ text: text.value.trim(), pictures: [...pictures] });

/** Until all pictures are there that were added. */
export const picturesRead = () => reading;

/** Write another one. */
export function setDraft(message) {
  text.value = message.text;
  pictures = [...message.pictures];
  showPictures();
  grow();
}

/** A file as a picture: its bytes stay as they are. */
export function readPicture(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name || "picture", url: reader.result });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** A small picture with its name for those who do not see it, or who have a browser that cannot show it. */
export const thumbnail = (picture) => el("img", { src: picture.url, alt: picture.name, title: picture.name });

/**
 * Take pictures that are picked, pasted or dropped anywhere.
 *
 * `tell(message)` gets what is to be announced, `complain(message)` what went wrong.
 */
export function connectComposer(tell, complain) {
  const file = byId("file");
  const take = (files) => {
    const added = addFiles([...files], tell, complain);
    reading = Promise.all([reading, added]);
    return added;
  };
  byId("add-picture").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    await take(file.files);
    file.value = ""; // so that the same file may be picked again
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    take(event.clipboardData.files);
  });
  connectDrop(take);
  text.addEventListener("input", grow);
}

function connectDrop(take) {
  const overlay = byId("drop");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    overlay.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) overlay.hidden = true; // left the window, not just an element
  });
  document.addEventListener("drop", (event) => {
    overlay.hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files);
  });
}

async function addFiles(files, tell, complain) {
  const images = files.filter((file) => file.type.startsWith("image/"));
  const others = files.filter((file) => !images.includes(file));
  const results = await Promise.allSettled(images.map(readPicture));
  const read = results.filter((result) => result.status === "fulfilled").map((result) => result.value);
  const failure = results.find((result) => result.status === "rejected");
  pictures = [...pictures, ...read];
  showPictures();
  if (read.length) tell(`${count(read.length)} added, ${pictures.length} in all`);
  if (failure) complain(`A picture cannot be read: ${failure.reason.message}`);
  if (others.length) complain(`No picture: ${others.map((file) => file.name).join(", ")}`);
  text.focus();
}

const count = (number) => (number === 1 ? "1 picture" : `${number} pictures`);

function showPictures() {
  const list = byId("pictures");
  list.hidden = pictures.length === 0;
  list.replaceChildren(
    ...pictures.map((picture) =>
      el(
        "li",
        {},
        thumbnail(picture),
        el("button", { type: "button", class: "remove", "aria-label": `Remove ${picture.name}`, click: () => remove(picture) }, "×"),
      ),
    ),
  );
}

function remove(picture) {
  pictures = pictures.filter((other) => other !== picture);
  showPictures();
  text.focus();
}

/** The field is as high as its text, up to what the style allows. */
function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}
