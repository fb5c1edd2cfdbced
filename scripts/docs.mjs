#!/usr/bin/env node
// `npm run docs`: the pages of the API, made from index.d.ts into target/api. A warning is an error: a link that leads nowhere, a type
// that is used and not exported.

import { join, relative } from 'node:path'
import { main, npmPackages, root, run, step } from './progress.mjs'

const HOME = join(root, 'docs', 'api')

/** Makes the pages. */
export async function apiPages() {
  await npmPackages(HOME)
  await step('API pages (typedoc)', async () => {
    await run(process.execPath, [join(HOME, 'node_modules', 'typedoc', 'bin', 'typedoc')], { cwd: HOME })
    return relative(root, join(root, 'target', 'api'))
  })
}

if (process.argv[1] === import.meta.filename) await main(apiPages)
