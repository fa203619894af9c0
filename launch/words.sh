# shellcheck shell=bash
# Sourced by the launchers: how they refuse, and how they print what they would run.

# Ends the script with one line.
refuse() {
  echo "$1" >&2
  exit 2
}

# Prints words as one line that a shell reads back as the same words: bare where that is safe, else in single quotes.
quoted() {
  local line='' word option quote=\' inside="'\\''"
  for word in "$@"; do
    option=
    if [[ $word =~ ^(--[A-Za-z0-9_.-]+=)(.*)$ ]]; then  # --option='a value' is easier to read than '--option=a value'
      option=${BASH_REMATCH[1]}
      word=${word#"$option"}
    fi
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]*$ || ( -z $option && -z $word ) ]]; then
      word="'${word//$quote/$inside}'"
    fi
    line+=" $option$word"
  done
  echo "${line# }"
}
