#!/usr/bin/env bash
# Puts the root file system of the image together: programs, the libraries they load, the model that ships, licences, and
# an SBOM made from the package list. Runs in the build stage of the Dockerfile.
# Usage: assemble.sh BIN_DIR ROOTFS [LIBRARY...]     LIBRARY: one that the server opens at run time, at the path it looks at
set -euo pipefail

bin=$1 root=$2
shift 2
opened=("$@")
top=$(cd "$(dirname "$0")/../.." && pwd)
share=$root/usr/share/minitron
mkdir -p "$root"/{proc,sys,dev,tmp,etc,usr/bin} "$share"/{models,licences}
install -m 755 "$bin/minitron-server" "$bin/minitron" "$root/usr/bin/"
strip "$root/usr/bin/minitron-server" "$root/usr/bin/minitron"
cp -r "$top/deploy/models/." "$share/models/"
cp "$top/LICENSE" "$share/licences/minitron-server"
printf 'minitron:x:65532:65532:minitron:/:/nonexistent\n' >"$root/etc/passwd"
printf 'minitron:x:65532:\n' >"$root/etc/group"
printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"

# Every library at the place where the loader looks for it, links followed. The driver's libraries come from the host.
mapfile -t libraries < <(
  { ldd "$bin/minitron-server" "$bin/minitron" "${opened[@]}" | grep -oE '\s/[^ )]*\.so[^ )]*'; printf '%s\n' "${opened[@]}"; } |
    tr -d '[:blank:]' | sed '/^$/d' | sort -u
)
packages=()
unpackaged=()
for library in "${libraries[@]}"; do
  install -D "$(readlink -f "$library")" "$root$library"
  owner=$(dpkg -S "$(readlink -f "$library")" 2>/dev/null || dpkg -S "$library" 2>/dev/null || dpkg -S "/usr$library" 2>/dev/null) ||
    unpackaged+=("$library")
  [ -z "$owner" ] || packages+=("${owner%%: *}")
done
# Only a toolkit that did not come as packages may have no entry in their list.
for library in "${unpackaged[@]}"; do
  [[ " ${opened[*]} " == *" $library "* ]] || { echo "assemble: $library belongs to no package" >&2; exit 1; }
done
mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sed 's/:.*//' | sort -u)

# What became part of the programs: archives they were linked with, and headers that are a whole library.
mapfile -t parts < <(ninja -C "$bin/.." -t commands bin/minitron-server bin/minitron | grep -oE '/usr/[^ ]+\.a( |$)' | tr -d ' ' | sort -u)
mapfile -t static_packages < <(dpkg -S "${parts[@]}" /usr/include/nlohmann/json.hpp 2>/dev/null | sed 's/:.*//' | sort -u)
unpackaged_parts=()
for part in "${parts[@]}"; do
  dpkg -S "$part" >/dev/null 2>&1 || unpackaged_parts+=("$part")
done
for package in "${packages[@]}" "${static_packages[@]}"; do
  cp "/usr/share/doc/$package/copyright" "$share/licences/$package" 2>/dev/null || :
done

# SPDX 2.3: one entry per package whose files are in the image, or in its programs.
revision=$(sha256sum "$root/usr/bin/minitron-server" | cut -d' ' -f1)
{
  printf '{"spdxVersion":"SPDX-2.3","dataLicense":"CC0-1.0","SPDXID":"SPDXRef-DOCUMENT","name":"minitron-server",\n'
  printf '"documentNamespace":"https://spdx.org/spdxdocs/minitron-server-%s",\n' "$revision"
  printf '"creationInfo":{"created":"%s","creators":["Tool: deploy/image/assemble.sh"]},\n' "$(date -u -d "@${SOURCE_DATE_EPOCH:-$(date +%s)}" +%Y-%m-%dT%H:%M:%SZ)"
  printf '"packages":[\n{"SPDXID":"SPDXRef-minitron-server","name":"minitron-server","downloadLocation":"NOASSERTION","filesAnalyzed":false,"licenseDeclared":"Apache-2.0","checksums":[{"algorithm":"SHA256","checksumValue":"%s"}]}' "$revision"
  for package in "${packages[@]}" "${static_packages[@]}"; do
    dpkg-query -W -f=',\n{"SPDXID":"SPDXRef-${Package}","name":"${Package}","versionInfo":"${Version}","supplier":"Organization: Debian","downloadLocation":"NOASSERTION","filesAnalyzed":false,"externalRefs":[{"referenceCategory":"PACKAGE-MANAGER","referenceType":"purl","referenceLocator":"pkg:deb/debian/${Package}@${Version}?arch=${Architecture}"}]}' "$package"
  done
  for library in "${unpackaged[@]}" "${unpackaged_parts[@]}"; do
    name=$(basename "${library%%.so*}" .a)
    version=${library##*.so.}
    [ "$version" != "$library" ] || version=NOASSERTION
    printf ',\n{"SPDXID":"SPDXRef-%s","name":"%s","versionInfo":"%s","downloadLocation":"NOASSERTION","filesAnalyzed":false,"checksums":[{"algorithm":"SHA256","checksumValue":"%s"}]}' \
      "${name//_/-}" "$name" "$version" "$(sha256sum "$library" | cut -d' ' -f1)"
  done
  printf '],\n"relationships":[{"spdxElementId":"SPDXRef-DOCUMENT","relationshipType":"DESCRIBES","relatedSpdxElement":"SPDXRef-minitron-server"}'
  relate() { printf ',\n{"spdxElementId":"SPDXRef-minitron-server","relationshipType":"%s","relatedSpdxElement":"SPDXRef-%s"}' "$@"; }
  for package in "${packages[@]}"; do relate DYNAMIC_LINK "$package"; done
  for package in "${static_packages[@]}"; do relate STATIC_LINK "$package"; done
  for library in "${unpackaged[@]}"; do relate DYNAMIC_LINK "$(basename "${library%%.so*}")"; done
  for part in "${unpackaged_parts[@]}"; do name=$(basename "$part" .a) && relate STATIC_LINK "${name//_/-}"; done
  printf ']}\n'
} >"$share/sbom.spdx.json"
sed -i 's/SPDXRef-\([^"]*\)+/SPDXRef-\1-plus-/g; s/SPDXRef-\([^"]*\)+/SPDXRef-\1-plus-/g' "$share/sbom.spdx.json"
du -sh "$root" | sed 's/^/image: /'
