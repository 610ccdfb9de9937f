// Stands for Android's and Compose's own library: signatures as far as the example calls them, so that it compiles here.
@file:JvmName("AndroidStubs")

package android.os

class Bundle
