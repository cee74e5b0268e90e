// What a C2PA validator that shares no code with the signer's finds in the files it is given.
//
//     node provenance.mjs FILE ...
//
// Prints one JSON object a file and line: whether it is valid, the codes of its checks that failed
// and passed, and the labels of its assertions.
import { readFile } from "node:fs/promises";
import { BMFF, JPEG } from "@trustnxt/c2pa-ts/asset";
import { SuperBox } from "@trustnxt/c2pa-ts/jumbf";
import { ManifestStore } from "@trustnxt/c2pa-ts/manifest";

BMFF.canReadBrands.add("isom"); // it lists pictures only; its boxes are an mp4's

// Of several boxes of one type it finds none, and ours are two: the manifest and the XMP.
class Mp4 extends BMFF {
  getBoxByPath(path) {
    return path === "/uuid" ? this.getManifestStoreBox() : super.getBoxByPath(path);
  }
}

for (const path of process.argv.slice(2)) {
  const content = await readFile(path);
  const asset = JPEG.canRead(content) ? new JPEG(content) : new Mp4(content);
  const store = ManifestStore.read(SuperBox.fromBuffer(asset.getManifestJUMBF()));
  const { isValid, statusEntries } = await store.validate(asset);
  const codes = (success) =>
    statusEntries.filter((entry) => entry.success === success).map((entry) => entry.code);
  const assertions = store.getActiveManifest().assertions.assertions.map((one) => one.fullLabel);
  console.log(JSON.stringify({ isValid, failed: codes(false), passed: codes(true), assertions }));
}
